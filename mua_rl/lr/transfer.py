"""The LR policy: from an LR record and a target configuration to the learning rate, with its reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from mua_rl.errors import UserError
from mua_rl.lr.record import LRRecord, check_learning_rate
from mua_rl.lr.rules import Configuration, TransferError, explain_ratio, lr_ratio
from mua_rl.lr.spec import FFT, Scheme

TRAINED_PRECISION = "float32"

RANK_EXPONENT = 0.5
"""The exponent c of `rank_correction` where nothing else was measured."""
RANK_EXPONENTS = {
    "grpo": RANK_EXPONENT,
    "sft": RANK_EXPONENT,
    "classification": RANK_EXPONENT,
    "images": RANK_EXPONENT,
    "vision-language": RANK_EXPONENT,
    "diffusion": RANK_EXPONENT,
    "ppo": 0.0,
}
"""c by algorithm, as measured in docs/results; c = 0 is the theory alone.

Init[B]'s best learning rate fell with the rank as r^-0.55 [-0.77, -0.26] in GRPO runs of SmolLM2, 60 steps long. It did
so too where nothing had a part in choosing c: in GRPO of the embedded model as r^-0.69 [-0.85, -0.49], and in six tasks
of supervised finetuning as r^-0.23 to r^-0.45. The theory's learning rate, taken from a
small rank to FFT, is too large by one to four octaves there. In PPO, whose heads are trained fully at any rank, it fell
as r^-0.07 [-0.18, +0.03].
"""

UNMOVED: Mapping[str, tuple[Scheme, ...]] = {"ppo": (Scheme.INIT_A,)}
"""By algorithm, the schemes within which the learning rate stays as it is at any rank and multiplier.

Not the theory's r^-1/2 for Init[A], but what was measured: in PPO the best learning rate fell as r^-0.20 [-0.28, -0.11]
over its ranks, and left alone it was nearer to the measured optima than the theory's in each of four sweeps (two tasks,
two base policies).
"""


@dataclass(frozen=True)
class Evidence:
    """How far off `transfer` was between two schemes, as measured in docs/results.

    Attributes:
        ranks: The smallest and the largest LoRA rank.
        alphas: The multipliers.
        steps: Of a run, as an LR record's schedule counts them: the mean of the curve whose runs took longest.
        octaves: |log2 of the predicted over the measured best learning rate| that nine pairs in ten kept to.
        loss: Share of the gain that nine pairs in ten lost at most at the predicted learning rate.
    """

    ranks: tuple[int, int]
    alphas: tuple[str, ...]
    steps: int
    octaves: float
    loss: float


EVIDENCE: Mapping[float, Mapping[str, Evidence]] = {
    RANK_EXPONENT: {
        "FFT, Init[B]": Evidence(ranks=(4, 256), alphas=("1",), steps=120, octaves=0.92, loss=0.018),
        "Init[A]": Evidence(ranks=(4, 256), alphas=("1", "1/r"), steps=120, octaves=1.10, loss=0.036),
        "Init[B]": Evidence(ranks=(4, 256), alphas=("1",), steps=120, octaves=0.83, loss=0.021),
    },
    0.0: {
        "FFT, Init[B]": Evidence(ranks=(2, 32), alphas=("1",), steps=40_960, octaves=1.24, loss=0.095),
        "Init[A]": Evidence(ranks=(2, 32), alphas=("1", "1/r"), steps=40_960, octaves=0.83, loss=0.107),
        "Init[B]": Evidence(ranks=(2, 32), alphas=("1",), steps=40_960, octaves=0.80, loss=0.079),
    },
}
"""By rank exponent and `pair_kind`: what `mua_rl.analysis.predictions.evidence` says of docs/results.

Of all algorithms together that have the exponent in `RANK_EXPONENTS`: how far off a rule is shows on other tasks.
Curves of PPO's are flat: the best learning rate is not known well there, nor does it matter much.
tests/test_policy.py tells when this is stale.
"""

FROM_RANK: Mapping[float, int] = {RANK_EXPONENT: 16}
"""By rank exponent, the smallest LoRA rank whose learning rate full finetuning (FFT) can rely on, in docs/results.

From r = 4, FFT lost more than a tenth of its gain in two sweeps of eight; from r = 16 on, at most 3.2 % in all of them.
"""

SWEPT = ("grpo", "ppo")
"""What `python -m mua_rl.sweep` sweeps."""
WEAK_LOSS = 0.1
"""Of the gain: where one pair in ten loses more, a rule is weak."""
LONG = 10
"""Times the longest measured runs: where a record's runs took longer, nothing measured tells."""


def pair_kind(source: Scheme, target: Scheme) -> str:
    """What a prediction is between, whatever its direction, as `EVIDENCE` has it: "Init[B]", "FFT, Init[B]"."""
    return ", ".join(sorted({source, target}))


@dataclass(frozen=True)
class LearningRate:
    """A learning rate with the reason for it, to be shown to the user and kept with the run.

    Attributes:
        value: η.
        why: Where it comes from.
        evidence: How far off it may be; `None`: nothing was measured, or nothing was predicted.
        warning: Why it should not be relied on, and what to do; "": no reason to doubt it.
        others: Learning rates, by role, of trained parameters that the theory does not cover, from where it comes from.
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
        return f"{self.why}; nine times in ten {self.accuracy} of the best, {loss}, as measured"

    def as_dict(self) -> dict[str, object]:
        """What a run folder keeps of it, which `kept` reads."""
        facts = {"learning_rate": self.value, "reason": self.reason, "warning": self.warning, **self.others}
        return {**facts, "is_guess": True} if self.is_guess else facts


def kept(written: Mapping) -> LearningRate:
    """The learning rate that a run folder keeps."""
    others = dict(written)
    value, why, warning = (others.pop(name) for name in ("learning_rate", "reason", "warning"))
    is_guess = bool(others.pop("is_guess", why.startswith("a guess")))  # before 0.2, the reason alone said it
    return LearningRate(value, why, warning=warning, others=others, is_guess=is_guess)


def given(value: float) -> LearningRate:
    """The learning rate that the user asked for."""
    return LearningRate(check_learning_rate(value), "given by --lr")


def default_exponent(algorithm: str) -> float:
    """c of `rank_correction` for an algorithm; 1/2 for one that was not measured."""
    return RANK_EXPONENTS.get(algorithm, RANK_EXPONENT)


def check_exponent(exponent: float) -> float:
    """Give back a c of `rank_correction`.

    Raises:
        UserError: It is not a number from 0 to 1.
    """
    if not 0 <= exponent <= 1:
        raise UserError(f"--rank_exponent takes a number from 0 (the theory alone) to 1, not {exponent:g}.")
    return exponent


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
        rank_exponent: c of `rank_correction`, beside the theory; `None`: `default_exponent` of the record's algorithm,
            and no change at all within what is `UNMOVED`.

    Raises:
        UserError: The theory does not give it, the record's weights were not trained in fp32, or c is none.
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
    # What is left of the theory then is the width.
    resized = replace(target, spec=source.spec) if unmoved else target
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
        reason += f"; in short runs a larger rank wants less, (r/m)^-{exponent:g}: times {correction:.4g}"
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
    low, high = known.ranks
    for side in (source, target):
        if side.rank is not None and not low <= side.rank <= high:
            return f"r = {side.rank} is outside the ranks that were measured, {low} to {high}"
        if side.rank is not None and str(side.spec.alpha) not in known.alphas:
            return f"α = {side.spec.alpha} was not measured with {side.scheme}"
    steps = record.schedule.get("steps") or record.schedule.get("env_steps")
    if isinstance(steps, int | float) and steps > LONG * known.steps:
        return f"the record's runs took {steps:,} steps, and those that were measured {known.steps:,}"
    return ""
