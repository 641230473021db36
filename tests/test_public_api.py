"""What other people's scripts import, and what they get for PEFT's own settings."""

import subprocess
import sys

import pytest
import torch
from helpers import make_record
from torch import nn

import mua_rl
from mua_rl import Full, LoRA, LRRecord, estimate_optimum, param_groups, transfer
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.errors import UserError
from mua_rl.lr.spec import AlphaRule
from mua_rl.run.arguments import AdapterArguments, parse_arguments


class Net(nn.Module):
    """Two layers of width 64 and 128."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc1, self.fc2 = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x):
        return self.fc2(torch.relu(self.fc1(x)))


LAYERS = ["fc1", "fc2"]


def record_of(model, **changes):
    sizes = {"widths": [64, 128], "outputs": 64, "target_modules": LAYERS}
    return make_record(**{"base_fingerprint": fingerprint(model), **sizes, **changes})


def test_every_public_name_is_there_and_importing_the_package_imports_no_torch():
    assert {Full, LoRA, LRRecord, estimate_optimum, param_groups, transfer} == {
        getattr(mua_rl, name) for name in mua_rl.__all__
    }
    assert set(mua_rl.__all__) <= set(dir(mua_rl))
    code = "import sys, mua_rl; mua_rl.LRRecord; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mua_rl.nothing


def test_a_plain_loop_trains_at_the_rate_of_a_record(tmp_path):
    model = Net()
    folder = record_of(model, rank=16, learning_rate=2**-8).save(tmp_path)
    adapter = LoRA(64, target_modules=LAYERS)
    rate = transfer(folder, adapter, model)
    assert rate.value == 2**-8 * (16 / 64) ** 0.5
    optimizer = torch.optim.AdamW(param_groups(adapter.attach(model), rate.value))
    assert {group["name"]: group["lr"] for group in optimizer.param_groups} == dict.fromkeys(
        ("lora_A", "lora_B"), rate.value
    )
    full = transfer(folder, Full(LAYERS), Net())
    assert full.value == 2**-8 * (16 / 64) ** 0.5  # m = 64


def test_a_rate_that_was_tuned_elsewhere_needs_its_source():
    source = LoRA(8, "A", lora_alpha=16, target_modules=LAYERS)
    rate = transfer(1e-3, LoRA(32, "A", lora_alpha=64, target_modules=LAYERS), Net(), source=source, algorithm="sft")
    assert rate.value == pytest.approx(1e-3 / 2)  # Init[A] at one multiplier has best LR ∝ (α n r)^-1/2
    with pytest.raises(UserError, match="source=LoRA"):
        transfer(1e-3, LoRA(8, target_modules=LAYERS), Net())


def test_a_record_of_other_weights_is_refused_and_one_of_other_layers_is_doubted():
    model = Net()
    with pytest.raises(UserError, match="another base model"):
        transfer(record_of(model, base_fingerprint="f" * 16), Full(LAYERS), model)
    assert not transfer(record_of(model, rank=16), Full(LAYERS), model).warning
    doubtful = transfer(record_of(model, rank=16, target_modules="all-linear"), Full(LAYERS), model)
    assert "tuned on the layers 'all-linear'" in doubtful.warning
    assert doubtful.evidence is None


def test_a_lora_reads_pefts_own_settings():
    assert LoRA(8, lora_alpha=16).alpha == LoRA(8, alpha="16/r").alpha == AlphaRule(16, 1)
    assert LoRA(8, lora_alpha=16, use_rslora=True).alpha == AlphaRule(16, 0.5)
    assert LoRA(8, alpha=2).alpha == AlphaRule(2)
    config = LoRA(8, lora_alpha=16, target_modules=LAYERS).peft_config(Net())
    assert (config.r, config.lora_alpha) == (8, 16)


@pytest.mark.parametrize("alpha", [16, 16.0, "32", "8"])
def test_a_multiplier_that_looks_like_lora_alpha_is_refused_with_both_ways_out(alpha):
    with pytest.raises(UserError, match=r"lora_alpha .* the multiplier .*/r: give lora_alpha .*\*r\^-0"):
        LoRA(8, alpha=alpha)
    with pytest.raises(UserError, match="give lora_alpha"):
        parse_arguments([AdapterArguments], ["--alpha", str(alpha)])


def test_a_large_multiplier_that_is_meant_is_taken_and_comes_back_as_it_was():
    assert LoRA(8, alpha="16*r^-0").alpha == AlphaRule(16)
    (arguments,), _ = parse_arguments([AdapterArguments], ["--alpha", str(AlphaRule(16))])
    assert arguments.spec.alpha == AlphaRule(16)


@pytest.mark.parametrize("flag", ["--lora_alpha", "--lora-alpha"])
def test_lora_alpha_is_a_flag(flag):
    (arguments,), given = parse_arguments([AdapterArguments], ["--rank", "8", flag, "16"])
    assert arguments.spec.alpha == AlphaRule(16, 1)
    assert given == {"rank": "8", "lora_alpha": 16}
    with pytest.raises(UserError, match="exclude each other"):
        parse_arguments([AdapterArguments], ["--alpha", "2", flag, "16"])
