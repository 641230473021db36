"""What was measured about the transfer of learning rates: how they move with the rank, and how far off a rule is.

The figures come from docs/results by `mua_rl.analysis.predictions.evidence`; tests/test_lr_transfer.py fails when they
are stale.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from mua_rl.lr.rules import Configuration
from mua_rl.lr.spec import Scheme

RANK_EXPONENT = 0.5
"""The exponent c of `mua_rl.lr.transfer.rank_correction` for an algorithm that was not measured."""
RANK_EXPONENTS = {
    **dict.fromkeys(("grpo", "sft", "classification", "images", "vision-language", "diffusion"), RANK_EXPONENT),
    "ppo": 0.0,
}
"""The measured c of each algorithm; c = 0 is the theory alone.

Init[B]'s best learning rate fell with the rank as r^-0.55 [-0.77, -0.26] in GRPO runs of SmolLM2, 60 steps long. It did
so too where nothing had a part in choosing c: in GRPO of the embedded model as r^-0.69 [-0.85, -0.49], and in six tasks
of supervised finetuning as r^-0.23 to r^-0.45. The theory's learning rate, taken from a small rank to FFT, is too large
by one to four octaves there. In PPO, whose heads are trained fully at any rank, it fell as r^-0.07 [-0.18, +0.03].
"""

UNMOVED: Mapping[str, tuple[Scheme, ...]] = {"ppo": (Scheme.INIT_A,)}
"""The schemes of each algorithm within which the learning rate stays as it is at any rank and multiplier.

The theory has r^-1/2 for Init[A]. In PPO the best learning rate was measured to fall as r^-0.20 [-0.28, -0.11], and a
learning rate that was left alone was nearer to the measured optima than the theory's in each of four sweeps (two tasks,
two base policies).
"""

FROM_RANK: Mapping[float, int] = {RANK_EXPONENT: 16}
"""The smallest LoRA rank, by rank exponent, whose learning rate full finetuning (FFT) can rely on.

From r = 4, FFT lost more than a tenth of its gain in two sweeps of eight; from r = 16 on, at most 3.2 % in all of them.
"""

WEAK_LOSS = 0.1
"""A rule is weak where one pair in ten loses more than this share of the gain."""
LONG = 10
"""The measurements say nothing about runs of more than this many times the steps of the longest measured ones."""


@dataclass(frozen=True)
class Evidence:
    """How far off a transfer between two schemes was, as measured in docs/results.

    Attributes:
        ranks: The smallest and the largest LoRA rank.
        alphas: The multipliers.
        steps: The steps of a run, as an LR record's schedule counts them: the mean of the curve with the longest runs.
        octaves: The error |log2 of the predicted over the measured best learning rate| that nine pairs in ten kept to.
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


def pair_kind(source: Scheme, target: Scheme) -> str:
    """The schemes that a prediction connects, whatever its direction, as in `EVIDENCE`: "Init[B]", "FFT, Init[B]"."""
    return ", ".join(sorted({source, target}))


def default_exponent(algorithm: str) -> float:
    """The exponent c of an algorithm; 1/2 for one that was not measured."""
    return RANK_EXPONENTS.get(algorithm, RANK_EXPONENT)
