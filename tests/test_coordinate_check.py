"""The coordinate check finds flat what the rules keep flat, and finds out where a rule is broken."""

import csv
import io
import math
import sys
from dataclasses import replace

import pytest
from transformers import GPT2Config, LlamaConfig

from mua_rl import coordinate_check
from mua_rl.coordinate_check import at_width, random_model
from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import AdapterSpec, Scheme
from mua_rl.probes.coordinate_report import FIXED, TRANSFERRED, Row, figure, lines, table, theory_order
from mua_rl.probes.feature_updates import DELTA_1, DELTA_2, DELTA_3, DELTA_Z, DELTA_Z_B


def run(monkeypatch, capsys, *arguments):
    """Exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["mua_rl.coordinate_check", *map(str, arguments)])
    code = 0
    try:
        run_command(coordinate_check.main)
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr()


def measured(*arguments):
    """The lines of the whole update, by axis, scheme, multiplier and LR rule."""
    rows = coordinate_check.measure(coordinate_check.parser().parse_args(list(arguments)))
    return {
        (line.axis, line.scheme, line.alpha, line.lr_rule): line
        for line in lines(rows)
        if line.quantity in (DELTA_Z, DELTA_Z_B)
    }


@pytest.mark.slow
def test_on_the_embedded_model_every_scheme_is_flat_in_rank_at_the_transferred_lr_and_init_a_is_not_at_a_fixed_one():
    found = measured("--ranks", "4", "64", "--schemes", "B", "A", "A:1/r", "FFT", "--seeds", "2")
    for scheme, alpha in (("Init[B]", "1"), ("Init[A]", "1"), ("Init[A]", "1/r")):
        assert found["rank", scheme, alpha, TRANSFERRED].verdict == "flat"
    assert found["rank", "Init[A]", "1", FIXED].verdict == "grows"
    # Where the rule is that the LR stays, there is no other LR to contrast with.
    assert ("rank", "Init[B]", "1", FIXED) not in found
    assert ("rank", "Init[A]", "1/r", FIXED) not in found
    # Init[B]'s update has FFT's size, which is why they share their LR.
    full = found["rank", "FFT", "", TRANSFERRED].sizes[None]
    assert found["rank", "Init[B]", "1", TRANSFERRED].sizes[64] == pytest.approx(full, abs=1)


@pytest.mark.slow
def test_on_random_weights_every_scheme_is_flat_in_width_at_the_transferred_lr_and_none_is_at_a_fixed_one():
    found = measured("--ranks", "4", "--widths", "64", "256", "--schemes", "B", "A", "FFT", "--seeds", "2")
    for scheme, alpha in (("Init[B]", "1"), ("Init[A]", "1"), ("FFT", "")):
        assert found["width", scheme, alpha, TRANSFERRED].verdict == "flat"
        assert found["width", scheme, alpha, FIXED].verdict == "grows"


@pytest.mark.slow
def test_the_command_writes_csv_and_figures_and_ends_well(tmp_path, monkeypatch, capsys):
    arguments = ("--ranks", 4, 64, "--widths", 64, 256, "--schemes", "B", "--seeds", 1, "--steps", 3)
    code, printed = run(monkeypatch, capsys, *arguments, "--output_dir", tmp_path / "out")
    assert code == 0
    for word in ("Init[B], α = 1", "LR transferred", "LR fixed", "r=64", "n=1024", "ΔZ_B", "flat", "grows"):
        assert word in printed.out
    for axis in ("rank", "width"):
        assert (tmp_path / "out" / f"coordinate_check_{axis}.png").stat().st_size > 10_000
    with open(tmp_path / "out" / "coordinate_check.csv") as stream:
        rows = list(csv.DictReader(stream))
    # 2 ranks, and 2 widths at 2 LRs each; 3 steps, 4 layers of 3 projections, 4 quantities
    assert len(rows) == (2 + 2 * 2) * 3 * 12 * 4
    assert {row["layer"] for row in rows} >= {"model.layers.0.mlp.gate_proj"}
    assert (tmp_path / "out" / "config.yaml").exists()


@pytest.mark.slow
def test_a_broken_rule_is_found_out_with_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coordinate_check, "lr_ratio", lambda source, target: 1.0)
    arguments = ("--ranks", 4, 64, "--schemes", "A", "--seeds", 1)
    code, printed = run(monkeypatch, capsys, *arguments, "--output_dir", tmp_path / "out")
    assert code == 1
    assert "not flat: ΔZ_B of Init[A], α = 1, slope +" in printed.out
    assert (tmp_path / "out" / "coordinate_check.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--ranks", 1000), "rank 1000 exceeds"),
        (("--ranks", 200), "rank 200 exceeds the size of the layer"),
        (("--ranks", 0), "rank"),
        (("--schemes", "C"), "'C'"),
        (("--schemes", "A:nonsense"), "multiplier"),
        (("--widths", 100), "multiples of 64"),
        (("--steps", 1), "--steps must be at least 2"),
        (("--lr", 2), "--lr"),
        (("--tolerance", -1), "--tolerance"),
        (("--model", "/nowhere"), "no model folder"),
        (("--task", "nonsense"), "no task"),
        (("--target_modules", "nowhere"), "nowhere"),
        (("--target_modules", "embed_tokens"), "its weight in common with another"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_anything_is_written(
    tmp_path, monkeypatch, capsys, arguments, message
):
    few = ("--seeds", 1, "--length", 1, "--schemes", "B")
    code, printed = run(monkeypatch, capsys, *few, *arguments, "--output_dir", tmp_path / "out")
    assert code == 2
    assert message in printed.err
    assert len(printed.err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_used_output_folder_is_refused_before_the_work(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setattr(coordinate_check, "measure", lambda args: pytest.fail("it measured"))
    code, printed = run(monkeypatch, capsys, "--output_dir", tmp_path)
    assert code == 2
    assert "not empty" in printed.err


def test_a_model_at_another_width_keeps_the_heads_and_the_shape_of_the_mlp():
    config = LlamaConfig(hidden_size=128, intermediate_size=384, num_attention_heads=4, num_key_value_heads=2)
    wide = at_width(config, 256)
    sizes = (wide.hidden_size, wide.intermediate_size, wide.num_attention_heads, wide.num_key_value_heads)
    assert sizes == (256, 768, 8, 4)
    assert config.hidden_size == 128
    with pytest.raises(UserError, match="multiples of 64"):  # two query heads of 32 share a key
        at_width(config, 96)
    with pytest.raises(UserError, match="gpt2 has no intermediate_size"):
        at_width(GPT2Config(), 256)


def test_random_weights_have_variance_one_over_fan_in_and_follow_the_seed():
    config = LlamaConfig(
        hidden_size=128, intermediate_size=512, num_attention_heads=2, num_hidden_layers=1, vocab_size=64
    )
    model = random_model(config, seed=1)
    down = model.model.layers[0].mlp.down_proj.weight
    assert down.var().item() == pytest.approx(1 / 512, rel=0.05)
    assert down.equal(random_model(config, seed=1).model.layers[0].mlp.down_proj.weight)
    assert not down.equal(random_model(config, seed=2).model.layers[0].mlp.down_proj.weight)


def rows_of(size, ranks=(4, 16, 64), scheme="Init[A]", kind="Linear", quantity=DELTA_Z_B):
    """Rows whose size is a function of the rank."""
    return [
        Row(
            "rank", scheme, "1", rank, 512, TRANSFERRED, 1e-3 * (4 / rank) ** 0.5, 0, 1, "x", kind, quantity, size(rank)
        )
        for rank in ranks
    ]


@pytest.mark.parametrize(
    ("size", "verdict", "slope"),
    [
        (lambda r: 0.1, "flat", 0),
        (lambda r: 0.1 * r**0.2, "flat", 0.2),
        (lambda r: 0.1 * r**0.5, "grows", 0.5),
        (lambda r: 0.1 / r, "vanishes", -1),
        (lambda r: 0.0, "zero", math.nan),
        (lambda r: 0.1 if r < 64 else math.inf, "diverged", math.nan),
        (lambda r: 0.1 if r < 64 else math.nan, "diverged", math.nan),
    ],
)
def test_slopes_and_verdicts(size, verdict, slope):
    (line,) = lines(rows_of(size))
    assert line.verdict == verdict
    assert line.slope == pytest.approx(slope, nan_ok=True)
    assert line.failed == (verdict != "flat")
    assert line.theory == pytest.approx(0)
    table([line], "rank")
    figure([line], "rank")


@pytest.mark.parametrize("size", [0.0, math.nan])
def test_full_finetuning_that_moved_nothing_or_diverged_has_a_verdict_and_a_figure_all_the_same(size):
    full = replace(rows_of(lambda r: size, ranks=(4,))[0], scheme="FFT", alpha="", rank=None, quantity=DELTA_Z)
    found = lines([*rows_of(lambda r: size), full])
    figure(found, "rank").savefig(io.BytesIO())
    assert {line.verdict for line in found} == {"zero" if size == 0 else "diverged"}


def test_a_single_rank_has_no_verdict_and_embeddings_do_not_count():
    (line,) = lines(rows_of(lambda r: 0.1, ranks=(4,)))
    assert (line.verdict, line.failed) == ("", False)
    (line,) = lines([*rows_of(lambda r: 0.1), *rows_of(lambda r: r, kind="Embedding")])
    assert line.verdict == "flat"


@pytest.mark.parametrize(
    ("scheme", "quantity", "slope"),
    [
        (Scheme.INIT_A, DELTA_1, 1),
        (Scheme.INIT_A, DELTA_2, 1),
        (Scheme.INIT_A, DELTA_Z_B, 1),
        (Scheme.INIT_B, DELTA_1, 0),
        (Scheme.INIT_B, DELTA_2, 1),
        (Scheme.INIT_B, DELTA_3, 1),
        (Scheme.INIT_B, DELTA_Z_B, 0),
    ],
)
def test_the_theorys_growth_with_rank_at_a_fixed_lr(scheme, quantity, slope):
    orders = [theory_order(quantity, Configuration(AdapterSpec(rank, scheme), 1024), 1 / 1024) for rank in (8, 64)]
    assert math.log2(orders[1] / orders[0]) / 3 == pytest.approx(slope)
