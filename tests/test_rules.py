"""The learning-rate rules against the paper's table and against their own derivation."""

import math

import pytest

from mua_rl.lr.rules import Configuration, TransferError, best_lr_order, explain_ratio, lr_ratio
from mua_rl.lr.spec import ALPHA_ONE, FFT, AdapterSpec, AlphaRule, Scheme

N = 4096
RULES = {"1": AlphaRule(), "1/sqrt(r)": AlphaRule(1, 0.5), "1/r": AlphaRule(1, 1)}


def lora(scheme: Scheme, rank: int, alpha: AlphaRule = ALPHA_ONE, width: int = N) -> Configuration:
    return Configuration(AdapterSpec(rank, scheme, alpha), width)


def fft(width: int = N) -> Configuration:
    return Configuration(FFT, width)


@pytest.mark.parametrize(
    ("scheme", "alpha", "rank_exponent", "width_exponent"),
    [
        (Scheme.INIT_A, "1", -1 / 2, -1 / 2),
        (Scheme.INIT_A, "1/sqrt(r)", -1 / 4, -1 / 2),
        (Scheme.INIT_A, "1/r", 0, -1 / 2),
        (Scheme.INIT_B, "1", 0, -1),
    ],
)
def test_exponents_are_the_papers_table(scheme, alpha, rank_exponent, width_exponent):
    small, large = lora(scheme, 4, RULES[alpha]), lora(scheme, 256, RULES[alpha])
    assert math.log(lr_ratio(small, large), 64) == pytest.approx(rank_exponent, abs=1e-12)
    wide = lora(scheme, 4, RULES[alpha], width=16 * N)
    assert math.log(lr_ratio(small, wide), 16) == pytest.approx(width_exponent, abs=1e-12)


def test_init_a_from_rank_8_to_128_divides_by_four():
    assert lr_ratio(lora(Scheme.INIT_A, 8), lora(Scheme.INIT_A, 128)) == 1 / 4


def test_init_b_at_alpha_one_is_rank_invariant_up_to_full_rank():
    assert {lr_ratio(lora(Scheme.INIT_B, 8), lora(Scheme.INIT_B, r)) for r in (1, 2, 64, N)} == {1.0}


def test_init_b_at_one_over_r_changes_regime_where_r_squared_is_n():
    orders = {r: best_lr_order(lora(Scheme.INIT_B, r, RULES["1/r"])) for r in (16, 64, 256)}
    assert orders[16] == pytest.approx(16 / N)  # r² < n: 1/(α n) binds
    assert orders[64] == pytest.approx(64 / N) == pytest.approx(N**-0.5)
    assert orders[256] == pytest.approx(N**-0.5)  # r² > n: (α n r)^(-1/2) binds


def test_init_a_with_a_large_multiplier_is_bound_by_one_over_alpha_r():
    # α r > n: the first of the two regimes.
    assert best_lr_order(lora(Scheme.INIT_A, 512, AlphaRule(16))) == pytest.approx(1 / (16 * 512))


@pytest.mark.parametrize("scheme", list(Scheme))
@pytest.mark.parametrize("alpha", RULES.values(), ids=RULES)
@pytest.mark.parametrize("rank", [1, 8, 256])
def test_the_best_lr_is_the_largest_that_keeps_the_feature_update_at_one(scheme, alpha, rank):
    configuration = fft() if scheme is Scheme.FFT else lora(scheme, rank, alpha)
    eta, a = best_lr_order(configuration), alpha(rank)
    update = {
        Scheme.INIT_A: max(a * eta * rank, a * eta**2 * N * rank),
        Scheme.INIT_B: max(a * eta * N, a * eta**2 * N * rank),
        Scheme.FFT: eta * N,
    }[scheme]
    assert update == pytest.approx(1.0)


def test_init_b_at_alpha_one_shares_its_lr_with_fft_both_ways():
    assert lr_ratio(lora(Scheme.INIT_B, 32), fft()) == 1.0
    assert lr_ratio(fft(), lora(Scheme.INIT_B, 32)) == 1.0


def test_the_same_configuration_has_ratio_exactly_one():
    for configuration in (fft(), lora(Scheme.INIT_A, 7, AlphaRule(1.7, 0.3)), lora(Scheme.INIT_B, 5)):
        assert lr_ratio(configuration, configuration) == 1.0


@pytest.mark.parametrize(
    ("source", "target", "cure"),
    [
        (lora(Scheme.INIT_A, 8), fft(), "tune with Init\\[B\\]"),
        (fft(), lora(Scheme.INIT_A, 8), "tune with Init\\[B\\]"),
        (lora(Scheme.INIT_A, 8), lora(Scheme.INIT_B, 8), "tune once more"),
        (lora(Scheme.INIT_B, 8, AlphaRule(1, 1)), fft(), "tune with α = 1"),
        (lora(Scheme.INIT_B, 8, AlphaRule(2)), fft(), "tune with α = 1"),
        (Configuration(AdapterSpec(8, Scheme.INIT_B), N, optimizer="sgd"), lora(Scheme.INIT_B, 16), "tune with AdamW"),
        (lora(Scheme.INIT_B, 16), Configuration(FFT, N, optimizer="lion_32bit"), "tune with AdamW"),
        (Configuration(AdapterSpec(8, Scheme.INIT_B), N, lora_plus_ratio=16), fft(), "equal learning rates"),
    ],
)
def test_what_the_theory_does_not_cover_is_refused_with_a_cure(source, target, cure):
    with pytest.raises(TransferError, match=cure):
        lr_ratio(source, target)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("1", AlphaRule()),
        ("0.5", AlphaRule(0.5)),
        ("1/r", AlphaRule(1, 1)),
        ("16 / r", AlphaRule(16, 1)),
        ("1/sqrt(r)", AlphaRule(1, 0.5)),
        ("/√r", AlphaRule(1, 0.5)),
        ("2*r^-0.25", AlphaRule(2, 0.25)),
        ("r^-0.25", AlphaRule(1, 0.25)),
        ("0.3333333333/r", AlphaRule(0.3333333333, 1)),  # every digit comes back, or a record is not of its own run
        ("123456789", AlphaRule(123456789)),
        ("2*r^-0.123456789", AlphaRule(2, 0.123456789)),
        ("2*r^-0.00001", AlphaRule(2, 1e-5)),
    ],
)
def test_alpha_rules_are_read_and_written_back(text, rule):
    assert AlphaRule.parse(text) == rule
    assert AlphaRule.parse(str(rule)) == rule


@pytest.mark.parametrize("text", ["", "r", "-1", "0", "nan", "1/", "2r", "1/r/r", "lora"])
def test_other_text_is_no_alpha_rule(text):
    with pytest.raises(ValueError, match="multiplier"):
        AlphaRule.parse(text)


@pytest.mark.parametrize("rank", [0, -1, N + 1])
def test_a_rank_outside_the_width_is_refused(rank):
    with pytest.raises(ValueError, match="rank"):
        lora(Scheme.INIT_A, rank)


def test_the_explanation_names_what_changed():
    text = explain_ratio(lora(Scheme.INIT_A, 8), lora(Scheme.INIT_A, 128))
    assert "r 8 → 128" in text
    assert "0.25" in text
