"""The LR policy: from an LR record and a target configuration to the learning rate, with its reason."""

from dataclasses import dataclass

from mua_rl.errors import UserError
from mua_rl.record import LRRecord, check_learning_rate
from mua_rl.rules import Configuration, Scheme, TransferError, explain_ratio, lr_ratio

TRAINED_PRECISION = "float32"

RANK_EXPONENTS = {"grpo": 0.5, "ppo": 0.0}
"""The exponent c of `rank_correction` by algorithm, as measured in docs/results; c = 0 is the theory alone.

Init[B]'s best learning rate fell with the rank as r^-0.46 [-0.72, -0.19] in GRPO runs of 60 steps, where the theory's
alone, taken from r = 16 to FFT, makes FFT diverge; and as r^-0.01 [-0.19, +0.17] in PPO, whose heads are trained fully
at any rank.
"""


@dataclass(frozen=True)
class LearningRate:
    """A learning rate with the reason for it, to be shown to the user and kept with the run."""

    value: float
    reason: str

    def __post_init__(self) -> None:
        check_learning_rate(self.value)


def given(value: float) -> LearningRate:
    """The learning rate that the user asked for."""
    return LearningRate(check_learning_rate(value), "given by --lr")


def rank_correction(source: Configuration, target: Configuration, exponent: float) -> float:
    """`(r_source / r_target)^c` between Init[B] and Init[B] or FFT, whose rank is m; 1 between all others.

    The theory keeps the size of a feature update. Under Init[B] the update lies in r of m output directions, so that
    the part of it along the reward's gradient is about √(r/m) of FFT's, and a run too short to learn the rest wants a
    larger learning rate at a smaller rank. c = 1/2 makes that part equal, c = 0 leaves the theory as it is.

    Raises:
        UserError: FFT is concerned, and neither configuration knows m.
    """
    sides = (source, target)
    if exponent == 0 or source == target or any(side.scheme is Scheme.INIT_A for side in sides):
        return 1.0
    outputs = target.outputs or source.outputs
    ranks = [outputs if side.rank is None else side.rank for side in sides]
    if ranks[0] is None or ranks[1] is None:
        raise UserError(
            "the record does not say how many outputs its layers have, which the rank correction needs: run it again, "
            "or take the theory alone with --rank_exponent 0."
        )
    return (ranks[0] / ranks[1]) ** exponent


def transfer(
    record: LRRecord, target: Configuration, source_name: str = "the record", rank_exponent: float | None = None
) -> LearningRate:
    """The learning rate of `target` that follows from `record`; the record's own, exactly, for its own configuration.

    Args:
        record: What was tuned.
        target: What is to be trained.
        source_name: Of the record, for the reader.
        rank_exponent: c of `rank_correction`; `None`: what `RANK_EXPONENTS` has for the record's algorithm.

    Raises:
        UserError: The theory does not give it, or the record's weights were not trained in fp32.
    """
    if record.weight_precision != TRAINED_PRECISION:
        raise UserError(
            f"{source_name} was tuned with trained weights in {record.weight_precision}, which rounds small updates "
            f"away and moves the best learning rate: tune again with {TRAINED_PRECISION} weights."
        )
    source = record.configuration()
    try:
        ratio, reason = lr_ratio(source, target), explain_ratio(source, target)
    except TransferError as error:
        raise UserError(f"{source_name} ({source}) does not give the learning rate of {target}: {error}") from None
    exponent = RANK_EXPONENTS.get(record.algorithm, 0.0) if rank_exponent is None else rank_exponent
    correction = rank_correction(source, target, exponent)
    if correction != 1:
        reason += f"; in short runs a larger rank wants less, (r/m)^-{exponent:g}: times {correction:.4g}"
    value = record.learning_rate * ratio * correction
    return LearningRate(value, f"{source_name} has {record.learning_rate:.4g} for {source}; {reason}")
