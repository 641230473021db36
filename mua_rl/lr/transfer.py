"""From an LR record and a target configuration to the target's learning rate, with its reason and how sure it is."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mua_rl.errors import UserError
from mua_rl.lr.evidence import (
    DOMAINS,
    EVIDENCE,
    FROM_RANK,
    RANK_EXPONENTS,
    UNMOVED,
    WEAK_LOSS,
    Evidence,
    default_exponent,
    pair_kind,
)
from mua_rl.lr.record import LRRecord, check_learning_rate
from mua_rl.lr.rules import Configuration, TransferError, explain_ratio, lr_ratio
from mua_rl.lr.spec import FFT, Scheme

TRAINED_PRECISION = "float32"
SEEN = "(three times in four or more on a sweep that it was not read off)"
"""What `LEFT_OUT_COVERAGE` says, in words."""
SWEPT = ("grpo", "ppo")
"""The algorithms of `python -m mua_rl.sweep`."""


@dataclass(frozen=True)
class LearningRate:
    """A learning rate with the reason for it, to be shown to the user and kept with the run.

    Attributes:
        value: The learning rate η.
        why: Where it comes from.
        evidence: How far off it may be; `None` where nothing was measured, or nothing was predicted.
        warning: Why it should not be relied on, and what to do; "" where there is no reason to doubt it.
        others: Learning rates, by role, of trained parameters that the theory does not cover, from the same source.
        is_guess: Whether nothing that was measured on this base gives it.
    """

    value: float
    why: str
    evidence: Evidence | None = None
    warning: str = ""
    others: Mapping[str, float] = field(default_factory=dict)
    is_guess: bool = False

    def __post_init__(self) -> None:
        check_learning_rate(self.value)

    @property
    def accuracy(self) -> str:
        """How far off it may be, in words; "" where there is no evidence."""
        return f"within a factor of {2**self.evidence.octaves:.2g}" if self.evidence else ""

    @property
    def reason(self) -> str:
        """Where it comes from and how far off it may be."""
        if self.evidence is None:
            return self.why
        loss = f"at a loss of up to {self.evidence.loss:.0%} of the gain"
        return f"{self.why}; nine times in ten {self.accuracy} of the best, {loss}, as measured {SEEN}"

    def as_dict(self) -> dict[str, Any]:
        """What a run folder keeps of it, which `from_dict` reads."""
        facts = {"learning_rate": self.value, "reason": self.reason, "warning": self.warning, **self.others}
        return {**facts, "is_guess": True} if self.is_guess else facts

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LearningRate":
        """The learning rate that `as_dict` wrote down."""
        others = dict(values)
        value, why, warning = (others.pop(name) for name in ("learning_rate", "reason", "warning"))
        is_guess = others.pop("is_guess", why.startswith("a guess"))  # before 0.2, the reason alone said it
        return cls(value, why, warning=warning, others=others, is_guess=is_guess)


def check_exponent(exponent: float) -> float:
    """Give back an exponent c of `rank_correction`.

    Raises:
        UserError: The exponent is not a number from 0 to 1.
    """
    if not 0 <= exponent <= 1:
        raise UserError(f"--rank_exponent takes a number from 0 (the theory alone) to 1, not {exponent:g}.")
    return exponent


def rank_correction(source: Configuration, target: Configuration, exponent: float) -> float:
    """`(r_source / r_target)^c` between Init[B] and Init[B] or FFT, whose rank is m; 1 between all others.

    The theory keeps the size of a feature update. Adam's steps have one size for every weight, so that the part of an
    update along the loss's gradient is under Init[B] √(r/m) of FFT's where the gradient's entries are Gaussian
    (docs/theory.md). c = 1/2 makes that part equal, c = 0 leaves the theory as it is. That it is so in short runs
    alone was not found: it held in runs of 60 and of 240 steps. m, the smallest fan-out of the trained layers, is a
    choice that fits what was measured; FFT's pairs alone are as near with the geometric mean of the layers'.

    Raises:
        UserError: FFT is concerned, and neither configuration knows m.
    """
    sides = (source, target)
    if exponent == 0 or source == target or any(side.scheme is Scheme.INIT_A for side in sides):
        return 1.0
    outputs = target.outputs or source.outputs
    of_source, of_target = (outputs if side.rank is None else side.rank for side in sides)
    if of_source is None or of_target is None:
        raise UserError(
            "the record does not say how many outputs its layers have, which the rank correction needs: run it again, "
            "or take the theory alone with --rank_exponent 0."
        )
    return (of_source / of_target) ** exponent


def transfer(
    record: LRRecord, target: Configuration, source_name: str = "the record", rank_exponent: float | None = None
) -> LearningRate:
    """The learning rate of `target` that follows from `record`; the record's own, exactly, for its own configuration.

    Args:
        record: What was tuned.
        target: What is to be trained.
        source_name: The record's name for the reader.
        rank_exponent: c of `rank_correction`, beside the theory; `None`: `default_exponent` of the record's algorithm,
            and no change at all within the schemes that are `UNMOVED`.

    Raises:
        UserError: The theory does not give the learning rate, the record's weights were not trained in fp32, or the
            exponent is out of range.
    """
    if record.weight_precision != TRAINED_PRECISION:
        raise UserError(
            f"{source_name} was tuned with trained weights in {record.weight_precision}, which rounds small updates "
            f"away and moves the best learning rate: tune again with {TRAINED_PRECISION} weights."
        )
    source = record.configuration()
    unmoved = (
        rank_exponent is None and source.scheme is target.scheme and target.scheme in UNMOVED.get(record.algorithm, ())
    )
    resized = replace(target, spec=source.spec) if unmoved else target  # the width alone is left to the theory then
    try:
        ratio, reason = lr_ratio(source, resized), explain_ratio(source, resized)
    except TransferError as error:
        raise UserError(f"{source_name} ({source}) does not give the learning rate of {target}: {error}") from None
    if unmoved and target != source:
        stays = f"in {record.algorithm} {target.scheme}'s best LR was measured to stay, whatever the rank and α"
        reason = stays if resized == source else f"{reason}; {stays}"
    exponent = default_exponent(record.algorithm) if rank_exponent is None else check_exponent(rank_exponent)
    correction = rank_correction(source, resized, exponent)
    if correction != 1:
        reason += f"; a larger rank was measured to want less, (r/m)^-{exponent:g}: times {correction:.4g}"
    value = record.learning_rate * ratio * correction
    is_guess = record.evidence == "guess"
    why = f"{'a guess that was run: ' * is_guess}{source_name} has {record.learning_rate:.4g} for {source}; {reason}"
    rate = LearningRate(value, why, others=record.other_learning_rates, is_guess=is_guess)
    return rate if target == source else _judged(rate, record, target, exponent)


def gives_full_finetuning(record: LRRecord) -> bool:
    """Whether the theory gives the learning rate of full finetuning from a record."""
    source = record.configuration()
    try:
        lr_ratio(source, replace(source, spec=FFT))
    except TransferError:
        return False
    return True


def _judged(rate: LearningRate, record: LRRecord, target: Configuration, exponent: float) -> LearningRate:
    """A transferred learning rate with how far off it may be, and a warning where that is unknown or much."""
    known = EVIDENCE[default_exponent(record.algorithm)].get(pair_kind(record.configuration().scheme, target.scheme))
    doubt, nearer = _why_unmeasured(record, target, exponent, known), target.rank or "full"
    least = FROM_RANK.get(exponent, 0)
    if not doubt and target.scheme is Scheme.FFT and record.rank is not None and record.rank < least:
        doubt = f"r = {record.rank} is small: from r = 4, FFT lost more than a tenth of its gain in two sweeps of eight"
        nearer = least
    rate = replace(rate, evidence=None if doubt else known)
    if rate.evidence and rate.evidence.loss > WEAK_LOSS:
        doubt = f"one such transfer in ten lost more than {rate.evidence.loss:.0%} of the gain"
    if not doubt:
        return rate
    command = f"python -m mua_rl.sweep --algo {record.algorithm} --ranks {nearer}"
    cure = f" ({command})" if record.algorithm in SWEPT else ""
    return replace(rate, warning=f"{doubt}: tune nearer to the target{cure}.")


def _why_unmeasured(record: LRRecord, target: Configuration, exponent: float, known: Evidence | None) -> str:
    """Why docs/results does not tell how far off a learning rate may be; "" where it does."""
    source, algorithm = record.configuration(), record.algorithm
    if record.evidence != "sweep":
        return f"the record is of a {record.evidence} and not of a sweep, and may be far from the best"
    if algorithm not in RANK_EXPONENTS:
        return f"no transfer was measured with {algorithm}"
    if known is None:
        return f"no transfer from {source.scheme} to {target.scheme} was measured"
    if exponent != RANK_EXPONENTS[algorithm]:
        return f"transfer with {algorithm} was measured with --rank_exponent {RANK_EXPONENTS[algorithm]:g}"
    if source.width != target.width:
        return "no transfer between widths was measured"
    return known.doubt(source, target) or DOMAINS[exponent].doubt(record)
