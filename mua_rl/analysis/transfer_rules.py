"""Rules that say what one curve's optimum tells of another's, and what people do instead of following one."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

from mua_rl.analysis.measured import Context, Measured, log2_ratio
from mua_rl.lr.evidence import UNMOVED, default_exponent, pair_kind
from mua_rl.lr.spec import FFT, AdapterSpec, Scheme

Predict = Callable[[Measured, AdapterSpec, Context], float | None]
"""From a tuned curve and a target to log2 of the target's best learning rate; `None` where a rule does not apply."""


@dataclass(frozen=True)
class Rule:
    """Predicts an optimum from another.

    Attributes:
        name: Its name, for tables.
        predict: The prediction.
        needs_source: Whether anything has to be tuned first.
        octaves: How far off nine predictions in ten are, by kind of pair (`pair_kind`).
        otherwise: The same for other kinds; `None`: nothing is known, and no interval is stated.
    """

    name: str
    predict: Predict
    needs_source: bool = True
    octaves: Mapping[str, float] = field(default_factory=dict, hash=False)
    otherwise: float | None = None

    def interval(self, source: AdapterSpec, target: AdapterSpec) -> float | None:
        """Octaves to either side of a prediction within which the optimum is, nine times in ten."""
        return self.octaves.get(pair_kind(source.scheme, target.scheme), self.otherwise)


@cache
def rank_corrected(exponent: float, name: str = "") -> Rule:
    """The theory times (r_source / r_target)^c for Init[B] and FFT, which counts as rank m, its layers' outputs.

    With c = 0, the theory alone, the features of a rank move as far as FFT's; with c = 1/2 the function along the
    gradient does, since Init[B] confines an update to r of m output directions.
    """

    def predict(source: Measured, target: AdapterSpec, context: Context) -> float | None:
        shift = log2_ratio(source.spec, target, context.width)
        correction = log2_rank_ratio(source.spec, target, context) if exponent else 0.0
        return None if shift is None or correction is None else source.optimum.log2_lr + shift - exponent * correction

    return Rule(name or f"theory × (r/m)^{exponent:.3g}", predict)


def log2_rank_ratio(source: AdapterSpec, target: AdapterSpec, context: Context) -> float | None:
    """log2 of r_target / r_source, FFT being of rank m: 0 where Init[A] is concerned, `None` for m unknown."""
    if Scheme.INIT_A in (source.scheme, target.scheme):
        return 0.0
    first, second = (context.outputs if spec.rank is None else spec.rank for spec in (source, target))
    if first == second:
        return 0.0
    return None if first is None or second is None else math.log2(second / first)


def shipped(algorithm: str) -> Rule:
    """What `mua_rl.lr.transfer.transfer` does of itself; algorithms that it treats alike have the same rule."""
    return _shipped(rank_corrected(default_exponent(algorithm)), UNMOVED.get(algorithm, ()))


@cache
def _shipped(corrected: Rule, unmoved: tuple[Scheme, ...]) -> Rule:

    def predict(source: Measured, target: AdapterSpec, context: Context) -> float | None:
        stays = source.spec.scheme is target.scheme and target.scheme in unmoved
        return (NO_RULE if stays else corrected).predict(source, target, context)

    return Rule("what mua_rl does by default", predict)


def equal_movement(exponent: float = 1.0) -> Rule:
    """The learning rate at which a step moves the policy as far as at the source's optimum, or part of the way there.

    It needs no theory and covers any two curves whose movement was measured, Init[A] and FFT too.

    Args:
        exponent: 1 makes movements equal, 1/2 is the geometric mean of that and of equal learning rates.
    """

    def predict(source: Measured, target: AdapterSpec, context: Context) -> float | None:
        moved = context.movement
        if source.spec not in moved or target not in moved:
            return None
        return source.optimum.log2_lr - exponent * math.log2(moved[target] / moved[source.spec])

    return Rule(f"equal movement^{exponent:g}", predict)


def _unmoved(source: Measured, target: AdapterSpec, context: Context) -> float | None:
    return None if log2_ratio(source.spec, target, context.width) is None else source.optimum.log2_lr


def _divided_by_ten(source: Measured, target: AdapterSpec, context: Context) -> float | None:
    applies = source.spec.init == "A" and target == FFT
    return source.optimum.log2_lr - math.log2(10) if applies else None


def _as_it_is(source: Measured, target: AdapterSpec, context: Context) -> float | None:
    applies = (source.spec.init, str(source.spec.alpha)) == ("A", "2") and target == FFT
    return source.optimum.log2_lr if applies else None


def fixed(learning_rate: float) -> Rule:
    """FFT at one learning rate, whatever the model."""
    return Rule(
        f"always {learning_rate:g}",
        lambda source, target, context: math.log2(learning_rate) if target == FFT else None,
        needs_source=False,
    )


THEORY = rank_corrected(0.0, "theory")
"""The theory's exponents and nothing else (`mua_rl.lr.rules.lr_ratio`)."""
NO_RULE = Rule("no rule, the LR unchanged", _unmoved)
"""The source's learning rate as it is, where the theory has one: a rule that does no better is not needed."""
TRANSFER_RULES: Sequence[Rule] = (THEORY, rank_corrected(0.25), rank_corrected(0.5))
MOVEMENT_RULES: Sequence[Rule] = (equal_movement(), equal_movement(0.5))
"""The rules for sweeps whose movements were measured."""
DIVIDED_BY_TEN = Rule("LoRA ÷ 10", _divided_by_ten)
"""FFT's learning rate is a tenth of LoRA's, as Tinker's cookbook has it, whose LoRA begins with B at zero."""
UNCHANGED = Rule("LoRA unchanged (Init[A] α=2)", _as_it_is)
"""FFT at the learning rate of a LoRA with PEFT's initialisation and `lora_alpha = 2r`.

PEFT's A is Kaiming-uniform, of a third of Init[A]'s variance; the nearest curve of a sweep is Init[A] with α = 2.
"""
HABITS: Sequence[Rule] = (DIVIDED_BY_TEN, UNCHANGED, fixed(1e-6))
"""What people do instead."""
