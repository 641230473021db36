"""`python -m mua_rl.probe`: the ratio of two learning rates from a gradient, and what is said of it."""

import math
import re
import sys

import pytest
import torch

from mua_rl.errors import UserError
from mua_rl.lr.spec import FFT, AdapterSpec
from mua_rl.probe import Side, main, parse_side, ratio, worth
from mua_rl.probes.gradient import Probe

GAUSSIAN = torch.randn(200, 300, generator=torch.Generator().manual_seed(0))


def probe(rest=0.0):
    """Of one Gaussian layer, beside which FFT trains weights whose gradients sum to `rest` of the layer's."""
    head = rest * GAUSSIAN.abs().sum().reshape(1)
    return Probe.of({"w": GAUSSIAN, "head": head}, ["w"])


@pytest.mark.parametrize(
    ("source", "target", "expected"),
    [
        ("B,4,1", "B,64,1", 1 / 4),
        ("B,8,1", "full", math.sqrt(8 / 200) / 1.5),
        ("full", "B,8,1", 1.5 / math.sqrt(8 / 200)),
        ("A,8,1", "A,32,1/r", 8),
        ("peft,16,32/r", "full", 32 / 300 / math.sqrt(3) / 1.5),
        ("full", "full", 1),
    ],
)
def test_the_ratio_makes_first_steps_gain_the_same(source, target, expected):
    assert ratio(probe(rest=0.5), parse_side(source), parse_side(target)) == pytest.approx(expected, rel=0.03)


def test_configurations_are_read_as_people_write_them():
    assert parse_side("full") == Side(FFT)
    assert parse_side("peft, 16, 32/r") == Side(AdapterSpec.parse(16, "A", "32/r"), peft_init=True)


@pytest.mark.parametrize("text", ["", "16", "X,4,1", "B,0,1", "B,-2,1", "B,full,1", "B,4", "B,4,nope", "B,4,1,2"])
def test_other_text_is_refused_in_one_line(text):
    with pytest.raises(UserError) as error:
        parse_side(text)
    assert "\n" not in str(error.value)


def test_a_rank_above_a_layer_is_refused():
    with pytest.raises(UserError, match="r = 512 is above 200"):
        ratio(probe(), parse_side("B,512,1"), Side(FFT))


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("B,4,1", "B,64,1", "within 0.4 octaves"),
        ("B,4,1", "full", "an octave too low"),
        ("peft,16,32/r", "full", "0.9 to 1.3 octaves too low"),
        ("A,16,1", "B,16,1", "not measured for this pair"),
        ("B,4,2", "full", "not measured with such a multiplier"),
        ("peft,16,1", "full", "not measured with such a multiplier"),
    ],
)
def test_what_is_said_of_a_ratio_is_what_was_measured_of_its_kind(source, target, said):
    assert said in worth(parse_side(source), parse_side(target))


def test_the_command_gives_the_rate_and_how_such_a_ratio_fared(monkeypatch, capsys):
    words = "probe embedded --from B,16,1 --to full --lr 1e-3 --prompts 4 --batches 2"
    monkeypatch.setattr(sys, "argv", words.split())
    main()
    out = capsys.readouterr().out
    factor = float(re.search(r"learning rate of FFT / .*: ([\d.]+) \(", out)[1])
    assert 0.1 < factor < 0.4
    assert f"0.001 becomes {0.001 * factor:.4g}"[:20] in out
    assert "how it fared: on SmolLM2 it put FFT an octave too low" in out
    assert all(name in out for name in ("m_eff", "n_eff", "F ", "rho"))
