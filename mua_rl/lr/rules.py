"""How the best learning rate scales with width and rank: the rules of Maximal-Update Adaptation (μA), nothing else.

Pure arithmetic in the paper's notation (N. Chen, S. Villar, S. Hayou, "Learning Rate Scaling across LoRA Ranks and
Transfer to Full Finetuning", arXiv 2602.06204). A finetuned linear layer is `W = W* + α B A` with `A: r × n` and
`B: m × r`; n is the width (fan-in), r the rank, α the multiplier, η the learning rate of A and B alike. An Adam step
moves every entry of a trained matrix by Θ(η), so one step changes a layer's LoRA features `Z_B = α B A Z` by

    Init[A]  (A₀ ~ N(0, 1/n), B₀ = 0):    ΔZ_B = max(Θ(α η r), Θ(α η² n r))
    Init[B]  (A₀ = 0, B₀ ~ N(0, 1/r)):    ΔZ_B = max(Θ(α η n), Θ(α η² n r))
    FFT                                   ΔZ   = Θ(η n)

and the best η is the largest that keeps this Θ(1). Only exponents follow from that, not constants: so a *ratio* of two
learning rates is known between configurations of one scheme, and between Init[B] with α = 1 and FFT, whose first steps
change the weights by entries of the same size. Everything else is refused with a `TransferError`.
"""

import math
import re
from dataclasses import dataclass, field
from enum import StrEnum


class TransferError(ValueError):
    """The theory does not give the ratio that was asked for; the message says what to do instead."""


class Scheme(StrEnum):
    """Which matrix of `B A` starts random (the other starts at zero), or no LoRA at all."""

    INIT_A = "Init[A]"
    INIT_B = "Init[B]"
    FFT = "FFT"


_NUMBER = r"(?P<constant>\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)"
_ALPHA_RULE = re.compile(
    rf"^(?:{_NUMBER})?(?P<power>/r|/sqrt\(r\)|/√r|\*?r\^-(?P<exponent>\d+(?:\.\d*)?(?:e-?\d+)?))?$", re.IGNORECASE
)


@dataclass(frozen=True)
class AlphaRule:
    """The multiplier as a function of the rank: `α(r) = constant · r^(-gamma)`.

    α = 1 is `AlphaRule(1, 0)`, rsLoRA's 1/√r is `AlphaRule(1, 0.5)`, 1/r is `AlphaRule(1, 1)`.
    """

    constant: float = 1.0
    gamma: float = 0.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.constant) and self.constant > 0 and math.isfinite(self.gamma)):
            raise ValueError(f"a multiplier α(r) = c·r^-γ needs a finite c > 0 and a finite γ, not {self}.")

    def __call__(self, rank: int) -> float:
        """α at a rank."""
        return self.constant * rank**-self.gamma

    def __str__(self) -> str:
        constant, exponent = (repr(float(value)).removesuffix(".0") for value in (self.constant, self.gamma))
        return constant + {0.0: "", 0.5: "/sqrt(r)", 1.0: "/r"}.get(self.gamma, f"*r^-{exponent}")

    @classmethod
    def parse(cls, text: str) -> "AlphaRule":
        """Read `1`, `0.5`, `1/r`, `1/sqrt(r)`, `16/r`, `2*r^-0.25`: what `str()` writes, and the usual ways to say it.

        Raises:
            ValueError: The text is no such rule.
        """
        match = _ALPHA_RULE.match(text.replace(" ", ""))
        if not match or not text.strip():
            raise ValueError(
                f"cannot read the multiplier {text!r}: write a number, or c/r, c/sqrt(r) or c*r^-gamma (as in 1, 1/r, "
                "16/sqrt(r), 2*r^-0.25)."
            )
        power = (match["power"] or "").lower()
        if power == "/r":
            gamma = 1.0
        elif power.startswith("/"):
            gamma = 0.5
        else:
            gamma = float(match["exponent"] or 0.0)
        return cls(float(match["constant"] or 1.0), gamma)


ALPHA_ONE = AlphaRule()


@dataclass(frozen=True)
class Configuration:
    """What the best learning rate depends on.

    Attributes:
        scheme: Init[A], Init[B] or FFT.
        width: n, the largest fan-in among the trained layers (the one that binds: every rule falls with n).
        rank: r; `None` for FFT.
        alpha: The multiplier's rule; ignored for FFT.
        optimizer: Its name, as in `--optim`; the rules hold for Adam's family.
        lora_plus_ratio: LR of B over LR of A; the rules hold at 1 (LoRA+ takes 16, say).
        outputs: m, the smallest fan-out among the trained layers, which bounds the rank of a full update; no rule
            here depends on it (`mua_rl.lr.transfer.rank_correction` does).
    """

    scheme: Scheme
    width: int
    rank: int | None = None
    alpha: AlphaRule = ALPHA_ONE
    optimizer: str = "adamw"
    lora_plus_ratio: float = 1.0
    outputs: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"a width is a positive integer, not {self.width}.")
        if (self.rank is None) != (self.scheme is Scheme.FFT):
            raise ValueError("a LoRA configuration needs a rank, and full finetuning (FFT) has none.")
        if self.rank is not None and not 1 <= self.rank <= self.width:
            raise ValueError(f"the rank must lie between 1 and the width {self.width}, not at {self.rank}.")

    def __str__(self) -> str:
        if self.scheme is Scheme.FFT:
            return "FFT"
        return f"LoRA {self.scheme.value}, α = {self.alpha}, r = {self.rank}"


def best_lr_order(configuration: Configuration) -> float:
    """The best learning rate of a configuration up to a constant that is the scheme's own.

    Init[A]: `η = min(1/(α r), (α n r)^(-1/2))`; Init[B]: `η = min(1/(α n), (α n r)^(-1/2))`; FFT: `η = 1/n`.
    """
    n = configuration.width
    if configuration.rank is None:
        return 1 / n
    r, alpha = configuration.rank, configuration.alpha(configuration.rank)
    both_move = (alpha * n * r) ** -0.5  # δ₃: the updates of A and B meet
    if configuration.scheme is Scheme.INIT_A:
        return min(1 / (alpha * r), both_move)
    return min(1 / (alpha * n), both_move)


def lr_ratio(source: Configuration, target: Configuration) -> float:
    """`η_target / η_source`.

    Raises:
        TransferError: The two configurations share no known constant.
    """
    if target == source:
        return 1.0
    for side in (source, target):
        if not side.optimizer.lower().removeprefix("paged_").startswith("adam"):
            raise TransferError(
                f"the rules hold for Adam's family, whose steps have one size for every weight, not for "
                f"{side.optimizer}: tune with AdamW, or tune each configuration by itself."
            )
        if side.lora_plus_ratio != 1:
            raise TransferError(
                "the rules hold for one learning rate for A and B, not for LoRA+: tune with equal learning rates, or "
                "tune each configuration by itself."
            )
    if source.scheme is not target.scheme:
        for side, other in ((source, target), (target, source)):
            if other.scheme is Scheme.FFT and side.scheme is Scheme.INIT_A:
                raise TransferError(
                    "between Init[A] and full finetuning (FFT) only the exponents are known, not the constant: tune "
                    "with Init[B] and α = 1, whose learning rate is FFT's."
                )
        if Scheme.FFT not in (source.scheme, target.scheme):
            raise TransferError(
                "between Init[A] and Init[B] only the exponents are known, not the constant: tune once more with the "
                "initialisation that you want to use."
            )
        lora = source if target.scheme is Scheme.FFT else target
        if lora.alpha != ALPHA_ONE:
            raise TransferError(
                f"Init[B] shares its learning rate with full finetuning (FFT) at α = 1 only, not at α = {lora.alpha}: "
                "tune with α = 1."
            )
    return best_lr_order(target) / best_lr_order(source)


def explain_ratio(source: Configuration, target: Configuration) -> str:
    """Why the ratio is what it is, in one sentence.

    Raises:
        TransferError: As `lr_ratio`.
    """
    ratio = lr_ratio(source, target)
    if target == source:
        return "the record's own configuration"
    if Scheme.FFT in (source.scheme, target.scheme) and source.scheme is not target.scheme:
        why = "Init[B] at α = 1 and FFT both have best LR ∝ 1/n"
    elif source.scheme is Scheme.FFT:
        why = "FFT has best LR ∝ 1/n"
    else:
        first = "1/(α r)" if source.scheme is Scheme.INIT_A else "1/(α n)"
        why = f"{source.scheme.value} has best LR ∝ min({first}, (α n r)^-1/2)"
    changes = [
        f"{symbol} {before:g} → {after:g}"
        for symbol, before, after in (
            ("r", source.rank, target.rank),
            ("n", source.width, target.width),
            ("α", _alpha_of(source), _alpha_of(target)),
        )
        if before is not None and after is not None and before != after
    ]
    return f"{why}{'; ' + ', '.join(changes) if changes else ''}: times {ratio:.4g}"


def _alpha_of(configuration: Configuration) -> float | None:
    return None if configuration.rank is None else configuration.alpha(configuration.rank)
