"""LoRA starts as the paper defines it, on any module, and what it saves is plain PEFT."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    Phi3Config,
    Phi3ForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from mua_rl.adapter.adapters import Full, LoRA, load_adapter
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.adapter.targets import lora_layers, lora_matrices
from mua_rl.errors import UserError
from mua_rl.lr.spec import AdapterSpec, AlphaRule, Scheme


class Zoo(nn.Module):
    """One layer of each kind that PEFT can give a LoRA."""

    def __init__(self, n=512):
        super().__init__()
        self.embed = nn.Embedding(n, 256)
        self.linear = nn.Linear(n, 384)
        self.conv = nn.Conv2d(n // 8, 192, kernel_size=3)


def tiny_llama(**changes):
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=2, **{**size, **changes}))


@pytest.mark.parametrize("init", ["A", "B"])
@pytest.mark.parametrize("rank", [8, 64])
@pytest.mark.parametrize(("layer", "fan_in"), [("linear", 512), ("conv", 64 * 9), ("embed", 512)])
def test_starting_values_have_the_papers_variance_and_the_product_is_zero(init, rank, layer, fan_in):
    model = LoRA(rank, init, target_modules=[layer]).attach(Zoo(), seed=1)
    ((_, lora_layer),) = lora_layers(model)
    a, b = lora_matrices(lora_layer)
    assert a.numel() // rank == fan_in
    random, zero, variance = (a, b, 1 / fan_in) if init == "A" else (b, a, 1 / rank)
    assert zero.abs().max() == 0
    # A sample variance of k normals has relative standard deviation sqrt(2/k); five of them is never by chance.
    tolerance = 5 * (2 / random.numel()) ** 0.5
    assert random.var().item() == pytest.approx(variance, rel=tolerance)
    assert abs(random.mean().item()) < 5 * (variance / random.numel()) ** 0.5


def test_each_expert_starts_with_the_papers_variance():
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=8, **size))
    wrapped = LoRA(4, "B", target_modules="all-linear").attach(model)
    experts = {layer.parameter_name: layer for _, layer in lora_layers(wrapped) if hasattr(layer, "parameter_name")}
    a, b = lora_matrices(experts["down_proj"])
    assert (a.shape, b.shape) == ((4 * 8, 128), (64, 4 * 8))
    assert a.abs().max() == 0
    assert b.var().item() == pytest.approx(1 / 4, rel=5 * (2 / b.numel()) ** 0.5)


@pytest.mark.parametrize("n", [64, 1024])
def test_the_variance_of_a_follows_the_width(n):
    model = LoRA(16, "A", target_modules=["linear"]).attach(Zoo(n))
    ((_, layer),) = lora_layers(model)
    assert lora_matrices(layer)[0].var().item() == pytest.approx(1 / n, rel=5 * (2 / (16 * n)) ** 0.5)


def test_starting_values_depend_on_the_seed_alone():
    def first_b(seed, noise):
        torch.manual_seed(noise)
        model = LoRA(4).attach(tiny_llama(), seed=seed)
        return lora_matrices(next(lora_layers(model))[1])[1].detach().clone()

    assert torch.equal(first_b(1, 10), first_b(1, 20))
    assert not torch.equal(first_b(1, 10), first_b(2, 10))


@pytest.mark.parametrize(("rule", "expected"), [("1", 1.0), ("1/r", 1 / 16), ("1/sqrt(r)", 1 / 4), ("32/r", 2.0)])
def test_pefts_multiplier_is_the_rules(rule, expected):
    model = LoRA(16, alpha=AlphaRule.parse(rule)).attach(tiny_llama())
    assert [layer.scaling["default"] for _, layer in lora_layers(model)] == pytest.approx([expected] * 6)


def test_the_default_targets_are_the_mlp_projections():
    model = LoRA(4).attach(tiny_llama())
    assert {name.rpartition(".")[2] for name, _ in lora_layers(model)} == {"gate_proj", "up_proj", "down_proj"}
    assert LoRA(4).widths(tiny_llama()) == Full().widths(tiny_llama()) == LoRA(4).widths(model) == [64, 128]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=64), {"mlp.c_fc", "mlp.c_proj"}),
        (
            GPTNeoXConfig(
                hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
            ),
            {"mlp.dense_h_to_4h", "mlp.dense_4h_to_h"},
        ),
        (
            OPTConfig(
                hidden_size=64,
                word_embed_proj_dim=64,
                ffn_dim=256,
                num_hidden_layers=2,
                num_attention_heads=2,
                vocab_size=64,
            ),
            {"fc1", "fc2"},
        ),
    ],
    ids=["gpt2", "gpt-neox", "opt"],
)
def test_the_default_targets_are_the_mlp_whatever_a_family_calls_it(config, expected):
    model = AutoModelForCausalLM.from_config(config)
    assert (Full().configuration(model).width, Full().configuration(model).outputs) == (256, 64)
    layers = [name for name, _ in lora_layers(LoRA(4).attach(model))]
    assert len(layers) == 4
    assert {name for name in expected if any(layer.endswith(f".{name}") for layer in layers)} == expected


def test_of_a_model_of_several_parts_the_text_layers_count():
    parts = nn.ModuleDict({"vision": nn.ModuleDict({"fc1": nn.Linear(8, 8)}), "text": tiny_llama()})
    assert {name.rpartition(".")[2] for name, _ in lora_layers(LoRA(4).attach(parts))} == {
        "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


def test_a_model_without_any_mlp_by_a_usual_name_is_one_line():
    with pytest.raises(UserError, match=r"no MLP layers .* --target_modules"):
        LoRA(4).attach(Zoo())


def test_fused_mlp_projections_carry_lora_as_separate_ones_do(tmp_path):
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    base = Phi3ForCausalLM(Phi3Config(vocab_size=64, num_key_value_heads=2, pad_token_id=0, **size))
    configuration = LoRA(4).configuration(base)
    assert (configuration.width, configuration.outputs, LoRA(4).widths(base)) == (128, 64, [64, 128])
    weights, tokens = copy.deepcopy(base.state_dict()), torch.arange(12).reshape(2, 6)
    model = LoRA(4).attach(base, seed=1)
    layers = {name.rpartition("layers.")[2]: lora_matrices(layer) for name, layer in lora_layers(model)}
    assert set(layers) == {f"{k}.mlp.{name}" for k in range(2) for name in ("gate_up_proj", "down_proj")}
    assert LoRA(4).widths(model) == [64, 128]
    a, b = layers["0.mlp.gate_up_proj"]
    assert (a.shape, b.shape, a.abs().max()) == ((4, 64), (2 * 128, 4), 0)
    assert b.var().item() == pytest.approx(1 / 4, rel=5 * (2 / b.numel()) ** 0.5)
    model(tokens, labels=tokens).loss.backward()
    assert all(a.grad.abs().sum() > 0 for a, _ in layers.values())
    with torch.no_grad():
        for a, _ in layers.values():
            a.normal_(std=0.1)
    model.save_pretrained(tmp_path)
    again = Phi3ForCausalLM(base.config)
    again.load_state_dict(weights)
    loaded = PeftModel.from_pretrained(again, str(tmp_path))
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)


def test_looking_for_widths_copies_no_weight(monkeypatch):
    """A second copy of a large model's weights, even for a moment, may not fit."""

    def refuse(*_):
        raise AssertionError("a weight was copied")

    model = tiny_llama()
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", refuse)
    assert LoRA(4).widths(model) == [64, 128]
    assert not any(parameter.is_meta for parameter in model.parameters())


def test_all_linear_spares_the_head():
    names = {
        name.rpartition(".")[2] for name, _ in lora_layers(LoRA(4, target_modules="all-linear").attach(tiny_llama()))
    }
    assert "q_proj" in names
    assert "lm_head" not in names


@pytest.mark.parametrize("adapter", [LoRA(4), LoRA(4, "A"), Full()])
def test_trained_weights_are_fp32_even_on_a_bf16_base(adapter):
    model = adapter.attach(tiny_llama().bfloat16())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}


@pytest.mark.parametrize("adapter", [LoRA(4, "A"), LoRA(4, "B"), Full()])
def test_attaching_does_not_change_the_function(adapter):
    tokens = torch.arange(12).reshape(2, 6)
    before = tiny_llama()(tokens).logits
    after = adapter.attach(tiny_llama())(tokens).logits
    assert torch.equal(before, after)


def trained_lora():
    """A LoRA whose A and B are both far from zero."""
    model = LoRA(4, "B").attach(tiny_llama(), seed=3)
    with torch.no_grad():
        for _, layer in lora_layers(model):
            lora_matrices(layer)[0].normal_(std=0.1)
    return model


def test_what_is_saved_is_plain_peft_and_merges_without_us(tmp_path):
    tokens = torch.arange(12).reshape(2, 6)
    model = trained_lora()
    model.save_pretrained(tmp_path)
    expected = model(tokens).logits
    loaded = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    assert torch.equal(loaded(tokens).logits, expected)
    assert torch.allclose(loaded.merge_and_unload()(tokens).logits, expected, atol=1e-5)
    assert "mua" not in json.dumps(json.loads((tmp_path / "adapter_config.json").read_text()))


def test_continuing_from_disk_never_starts_anew(tmp_path):
    model = trained_lora()
    model.save_pretrained(tmp_path)
    again = load_adapter(tiny_llama(), tmp_path)
    for (_, old), (_, new) in zip(lora_layers(model), lora_layers(again), strict=True):
        assert torch.equal(lora_matrices(old)[0], lora_matrices(new)[0])
        assert torch.equal(lora_matrices(old)[1], lora_matrices(new)[1])
    assert all(lora_matrices(layer)[0].requires_grad for _, layer in lora_layers(again))


def test_merged_is_a_plain_model_for_lora_and_full_alike():
    tokens = torch.arange(12).reshape(2, 6)
    lora = trained_lora()
    expected = lora(tokens).logits
    merged = LoRA(4).merged(lora)
    assert isinstance(merged, LlamaForCausalLM)
    assert torch.allclose(merged(tokens).logits, expected, atol=1e-5)
    full = Full().attach(tiny_llama())
    assert Full().merged(full) is full


def test_a_vision_transformer_carries_lora_too():
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 96}
    config = ViTConfig(image_size=32, num_labels=8, **size)
    torch.manual_seed(0)
    model = LoRA(4, target_modules="all-linear").attach(ViTForImageClassification(config))
    assert len(list(lora_layers(model))) >= 12
    model(torch.randn(1, 3, 32, 32)).logits.sum().backward()
    assert all(lora_matrices(layer)[0].grad.abs().sum() > 0 for _, layer in lora_layers(model))  # B random: A moves


def test_pytorchs_own_encoder_uses_its_lora_in_evaluation_as_in_training(tmp_path):
    torch.manual_seed(0)
    layer, x = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True), torch.randn(2, 5, 32)
    for attach in (
        lambda model: LoRA(4, "A", target_modules=["linear1", "linear2"]).attach(model),
        lambda model: load_adapter(model, tmp_path),
    ):
        torch.backends.mha.set_fastpath_enabled(True)
        model = attach(nn.Sequential(copy.deepcopy(layer)))
        for _, carrier in lora_layers(model):
            nn.init.normal_(lora_matrices(carrier)[1])
        with torch.no_grad():
            assert torch.allclose(model.eval()(x), model.train()(x), atol=1e-5)
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("targets", [["linear1", "out_proj"], "all-linear"])
def test_a_layer_that_pytorchs_attention_never_calls_is_refused(targets):
    with pytest.raises(UserError, match=r"weight of 0\.self_attn\.out_proj past any LoRA, which would train nothing"):
        LoRA(4, target_modules=targets).attach(nn.Sequential(nn.TransformerEncoderLayer(32, 4, 64)))


def test_pytorchs_attention_as_a_whole_carries_lora_by_pefts_wrapper():
    attention, x = nn.MultiheadAttention(32, 4), torch.randn(5, 2, 32)
    model = LoRA(4, "A", target_modules=["attention"]).attach(nn.ModuleDict({"attention": attention}))
    assert len(list(lora_layers(model))) == 2
    layer = model.base_model.model["attention"]
    before = layer(x, x, x)[0]
    for _, carrier in lora_layers(model):
        nn.init.normal_(lora_matrices(carrier)[1])
    assert not torch.allclose(layer(x, x, x)[0], before)


@pytest.mark.parametrize(("layer", "limit"), [("linear", 384), ("conv", 192), ("embed", 256)])
def test_a_rank_above_a_layers_size_is_refused_by_name(layer, limit):
    LoRA(limit, target_modules=[layer]).attach(Zoo())
    with pytest.raises(UserError, match=f"exceeds the size of the layer .*{layer}"):
        LoRA(limit + 1, target_modules=[layer]).attach(Zoo())


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens"])
def test_a_layer_whose_weight_another_shares_is_refused_for_it_could_not_be_merged(name):
    LoRA(4, target_modules=[name]).attach(tiny_llama(tie_word_embeddings=False))
    with pytest.raises(UserError, match=f"{name} has its weight in common with another"):
        LoRA(4, target_modules=[name, "up_proj"]).attach(tiny_llama(tie_word_embeddings=True))


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (lambda: LoRA(0), "at least 1"),
        (lambda: LoRA(-3), "at least 1"),
        (lambda: LoRA(4, "pissa"), "PiSSA"),
        (lambda: AdapterSpec.parse(4, "B", "nonsense"), "multiplier"),
        (lambda: LoRA(4).attach(Zoo()), "--target_modules"),
        (lambda: LoRA(4, target_modules=["nowhere"]).attach(Zoo()), "nowhere"),
        (lambda: LoRA(4).attach(LoRA(4).attach(tiny_llama())), "carries a LoRA already"),
        (lambda: LoRA(500).configuration(tiny_llama()), "width"),
        (lambda: load_adapter(tiny_llama(), "/nowhere"), "no adapter"),
    ],
)
def test_what_cannot_be_attached_is_refused(adapter, message):
    with pytest.raises(UserError, match=message):
        adapter()


def test_an_adapter_of_another_model_is_refused(tmp_path):
    trained_lora().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no adapter of this model"):
        load_adapter(tiny_llama(hidden_size=32), tmp_path)


def test_the_configuration_is_what_the_rules_need():
    assert str(LoRA(4, "A", AlphaRule(1, 1)).configuration(tiny_llama())) == "LoRA Init[A], α = 1/r, r = 4"
    full = Full().configuration(tiny_llama(), "adamw_torch")
    assert (full.scheme, full.width, full.rank, full.optimizer) == (Scheme.FFT, 128, None, "adamw_torch")


def test_the_fingerprint_knows_weights_not_precision_or_wrapping():
    model = tiny_llama()
    plain = fingerprint(model)
    assert fingerprint(tiny_llama().bfloat16()) == plain
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.05)
    assert fingerprint(model) != plain
    assert fingerprint(tiny_llama(num_hidden_layers=1)) != plain


def test_pefts_own_inits_are_neither_scheme():
    """The reason for drawing A and B ourselves; if this fails, PEFT has changed (see `mua_rl.adapter`)."""
    variances = {}
    for init in (True, "gaussian"):
        torch.manual_seed(0)
        model = get_peft_model(Zoo(), LoraConfig(r=64, target_modules=["linear"], init_lora_weights=init))
        ((_, layer),) = lora_layers(model)
        a, b = lora_matrices(layer)
        assert b.abs().max() == 0
        variances[init] = a.var().item()
    assert variances[True] == pytest.approx(1 / (3 * 512), rel=0.1)
    assert variances["gaussian"] == pytest.approx(1 / 64**2, rel=0.1)
