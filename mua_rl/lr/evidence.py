"""What was measured about the transfer of learning rates: how they move with the rank, and how far off a rule is.

The figures come from docs/results by `mua_rl.analysis.predictions.evidence`; tests/test_lr_transfer.py fails when they
are stale.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mua_rl.lr.record import LRRecord
from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import Scheme

RANK_EXPONENT = 0.5
"""The exponent c of `mua_rl.lr.transfer.rank_correction` for an algorithm that was not measured."""
RANK_EXPONENTS = {
    **dict.fromkeys(("grpo", "sft", "classification", "images", "vision-language", "diffusion"), RANK_EXPONENT),
    "ppo": 0.0,
}
"""The measured c of each algorithm; c = 0 is the theory alone.

Init[B]'s best learning rate fell with the rank as r^-0.55 [-0.77, -0.26] in GRPO runs of SmolLM2, 60 steps long, as
r^-0.50 [-0.73, -0.23] in runs of 240 steps, as r^-0.69 [-0.85, -0.49] in GRPO of the embedded model and as r^-0.23 to
r^-0.45 in six tasks of supervised finetuning. The mean of the eight sweeps but that of 240 steps is r^-0.41
[-0.54, -0.28].
The theory's learning rate, taken from a small rank to FFT, is too large by one to four octaves there. Against c = 1/4,
1/2 is nearer in five of six sweeps, which does not settle it. In PPO it fell as r^-0.07 [-0.18, +0.03]; the KL stop,
heads that are trained fully and Adam's eps have a part in that, measured in a pilot only (docs/theory.md).
"""

UNMOVED: Mapping[str, tuple[Scheme, ...]] = {"ppo": (Scheme.INIT_A,)}
"""The schemes of each algorithm within which the learning rate stays as it is at any rank and multiplier.

The theory has r^-1/2 for Init[A]. In PPO the best learning rate was measured to fall as r^-0.20 [-0.28, -0.11], and a
learning rate that was left alone was nearer to the measured optima than the theory's in each of four sweeps (two tasks,
two base policies).
"""

FROM_RANK: Mapping[float, int] = {RANK_EXPONENT: 16}
"""The smallest LoRA rank, by rank exponent, whose learning rate full finetuning (FFT) can rely on.

From r = 4, FFT lost more than a tenth of its gain in two sweeps of eight; from r = 16 on, at most 3.2 % in all of them,
which is no finer than what two or three seeds can show (about 4 %).
"""

WEAK_LOSS = 0.1
"""A rule is weak where one pair in ten loses more than this share of the gain."""
LEFT_OUT_COVERAGE: Mapping[float, float] = {RANK_EXPONENT: 0.75, 0.0: 0.85}
"""The share of a sweep's pairs that lie within `Evidence.octaves` where these are read off the other sweeps alone."""
LONG = 10
"""The measurements say nothing about runs of more than this many times the steps of the longest measured ones."""


@dataclass(frozen=True)
class Evidence:
    """How far off a transfer between two schemes was, as measured in docs/results.

    Attributes:
        ranks: The smallest and the largest LoRA rank.
        alphas: The multipliers.
        steps: The steps of a run, as an LR record's schedule counts them: the mean of the curve with the longest runs.
        octaves: The error |log2 of the predicted over the measured best learning rate| that nine pairs in ten kept to,
            of the pairs that it was read off; see `LEFT_OUT_COVERAGE` for others.
        loss: The share of the gain that nine pairs in ten lost at most at the predicted learning rate.
    """

    ranks: tuple[int, int]
    alphas: tuple[str, ...]
    steps: int
    octaves: float
    loss: float

    def doubt(self, *sides: Configuration) -> str:
        """Why the measurements do not cover a rank or a multiplier of these configurations; "" where they do."""
        low, high = self.ranks
        for side in sides:
            if side.rank is not None and not low <= side.rank <= high:
                return f"r = {side.rank} is outside the ranks that were measured, {low} to {high}"
            if side.rank is not None and str(side.spec.alpha) not in self.alphas:
                return f"α = {side.spec.alpha} was not measured with {side.scheme}"
        return ""


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
"""The evidence by rank exponent and `pair_kind`.

It is of all algorithms with the exponent together, since how far off a rule is shows on other tasks. The curves of PPO
are flat: the best learning rate is not known well there, nor does it matter much.
"""


BEYOND = 2
"""Sizes, steps and batches of up to this many times what was measured, or one part in so many, count as measured."""


@dataclass(frozen=True)
class Domain:
    """The runs that the evidence is of; least and largest of each number.

    Attributes:
        widths: n, the largest fan-in of a base's layers.
        outputs: m, their smallest fan-out.
        steps: Of a run, as in `Evidence`.
        batch: The completions or examples (PPO: environment steps) that an optimizer step is made of.
        optimizers: Their names.
    """

    widths: tuple[int, int]
    outputs: tuple[int, int]
    steps: tuple[int, int]
    batch: tuple[int, int]
    optimizers: tuple[str, ...]

    def doubt(self, record: LRRecord) -> str:
        """Why a record's runs are unlike those that were measured; "" where they are not, or where it does not say."""
        low, high = self.steps
        steps = _steps(record)
        if steps is not None and not low / BEYOND <= steps <= LONG * high:
            return f"the record's runs took {steps:,} steps, and those that were measured {low:,} to {high:,}"
        sizes = (
            ("the layers' width n", max(record.widths), self.widths),
            ("the layers' fan-out m", record.outputs, self.outputs),
            ("the batch", _batch(record), self.batch),
        )
        for what, size, (low, high) in sizes:
            if size is not None and not low / BEYOND <= size <= BEYOND * high:
                return f"{what} is {size:,}, and transfer was measured from {low:,} to {high:,}"
        name = str(record.optimizer["name"])
        if name not in self.optimizers:
            return f"no transfer was measured with {name}"
        modules = record.target_modules if isinstance(record.target_modules, list) else [record.target_modules]
        others = [name for name in modules if not f".{name}".endswith(tuple(f".{m}" for m in MEASURED_MODULES))]
        if record.algorithm in LANGUAGE and others:
            return f"transfer was measured with the MLP's projections, not with {', '.join(others)}"
        return ""


DOMAINS: Mapping[float, Domain] = {
    RANK_EXPONENT: Domain(
        widths=(256, 1536), outputs=(64, 576), steps=(40, 120), batch=(32, 256),
        optimizers=("adamw", "adamw_torch", "adamw_torch_fused"),
    ),
    0.0: Domain(
        widths=(128, 256), outputs=(128, 256), steps=(25_600, 40_960), batch=(128, 256),
        optimizers=("adam", "adamw", "adamw_torch"),
    ),
}  # fmt: skip
"""The runs behind `EVIDENCE`, by rank exponent: those of docs/results, on bases of at most 135 M weights."""
LANGUAGE = ("grpo", "sft")
"""The algorithms whose layers are language models'."""
MEASURED_MODULES = (
    "mlp", "gate_proj", "up_proj", "gate_up_proj", "down_proj", "mlp.c_fc", "mlp.c_proj", "dense_h_to_4h",
    "dense_4h_to_h", "fc1", "fc2",
)  # fmt: skip
"""The target modules of language models that were measured, as people name them."""


def _steps(record: LRRecord) -> int | None:
    """The steps of a record's runs; `None` where they are not known."""
    steps = record.schedule.get("env_steps" if record.algorithm == "ppo" else "steps")
    return steps if isinstance(steps, int) and steps > 0 else None


def _batch(record: LRRecord) -> int | None:
    """What an optimizer step of a record's runs is made of; `None` where it is not known."""
    if record.algorithm == "ppo":
        sizes = [record.batch.get("minibatch")]
    else:
        sizes = [record.batch.get("prompts"), record.batch.get("completions_per_prompt")]
        sizes.append(1 / (record.batch.get("optimizer_steps_per_batch") or 1))
    if not all(isinstance(size, int | float) for size in sizes):
        return None
    return round(math.prod(size for size in sizes if size))


def pair_kind(source: Scheme, target: Scheme) -> str:
    """The schemes that a prediction connects, whatever its direction, as in `EVIDENCE`: "Init[B]", "FFT, Init[B]"."""
    return ", ".join(sorted({source, target}))


def default_exponent(algorithm: str) -> float:
    """The exponent c of an algorithm; 1/2 for one that was not measured."""
    return RANK_EXPONENTS.get(algorithm, RANK_EXPONENT)
