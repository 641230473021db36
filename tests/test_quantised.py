"""A quantised base: QLoRA trains on the CPU, its policy is merged in full precision, and what cannot work says so."""

from importlib.util import find_spec

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from mua_rl.adapter.adapters import LoRA
from mua_rl.errors import UserError
from mua_rl.grpo import run as grpo
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.base import load_base
from mua_rl.lm import models
from mua_rl.merge import merge
from mua_rl.rollouts.memory import PolicySize

if find_spec("bitsandbytes") is None:
    pytest.skip("bitsandbytes is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow

SMALL = ["--per_device_train_batch_size", "16", "--gradient_accumulation_steps", "1", "--report_to", "none"]
SMALL += ["--held_out_steps", "0", "--held_out_problems", "32", "--lr", "1e-5", "--max_steps", "1"]
IDS = torch.arange(8)[None]


def eight_bit(folder):
    model = models.load_model("embedded", quantization_config={"load_in_8bit": True, "quant_method": "bitsandbytes"})
    model.save_pretrained(folder)
    models.load_tokenizer("embedded").save_pretrained(folder)
    return ["--model", str(folder)]


def four_bit(folder):
    return ["--load_in_4bit", "true"]


@pytest.mark.parametrize("base", [four_bit, eight_bit])
def test_a_lora_on_a_quantised_base_trains_in_fp32_and_its_merged_policy_is_the_trained_one(base, tmp_path):
    flags = base(tmp_path / "base")
    run = grpo.train(*parse([*SMALL, *flags, "--rank", "4", "--output_dir", str(tmp_path / "r")]))
    weights = load_file(run.path / "adapter" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    loaded, _ = load_base(parse([*SMALL, *flags])[0], None)
    trained = PeftModel.from_pretrained(loaded, str(run.path / "adapter")).eval()
    merge(str(run.path), tmp_path / "merged")
    merged = models.load_model(str(tmp_path / "merged")).eval()
    with torch.no_grad():
        logits, own = merged(IDS).logits, trained(IDS).logits
    assert not models.is_quantised(merged)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    assert (logits - own).abs().max() < 0.01 * own.abs().max()  # 8-bit layers round their inputs as well
    onward = ["--start-from", str(run.path), "--output_dir", str(tmp_path / "on")]
    assert grpo.train(*parse([*SMALL, *onward])).result().steps == 1


def test_a_quantised_base_is_seen_with_the_sizes_of_its_layers():
    plain = models.load_model("embedded")
    packed = load_base(parse([*SMALL, "--load_in_4bit", "true"])[0], None)[0]
    assert LoRA(4).widths(packed) == LoRA(4).widths(plain)
    assert LoRA(4, target_modules="all-linear").widths(packed) == [128, 512]
    size, other = PolicySize.of(LoRA(4).attach(packed)), PolicySize.of(LoRA(4).attach(plain))
    assert size.parameters == other.parameters and size.frozen_bytes < other.frozen_bytes / 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--rank", "full"], "quantised and cannot be trained themselves: train a LoRA"),
        (["--rank", "4", "--use_vllm", "--vllm_sync", "merged"], "cannot be merged into quantised weights"),
    ],
)
def test_what_quantised_weights_cannot_do_is_one_line_before_anything_is_written(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr("mua_rl.grpo.setup.check_vllm", lambda: None)
    monkeypatch.setenv("MASTER_PORT", "0")
    with pytest.raises(UserError, match=message):
        grpo.train(*parse([*SMALL, "--load_in_4bit", "true", *flags, "--output_dir", str(tmp_path / "r")]))
    assert not (tmp_path / "r").exists()
