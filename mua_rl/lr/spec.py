"""What is trained, as far as a learning rate depends on it: a LoRA's rank, scheme and multiplier, or all weights."""

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from mua_rl.errors import UserError


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
        power = {0.0: "", 0.5: "/sqrt(r)", 1.0: "/r"}.get(self.gamma, f"*r^-{exponent}")
        return constant + ("*r^-0" if self.gamma == 0 and self.constant >= LEAST_LORA_ALPHA else power)

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
LEAST_LORA_ALPHA = 8.0
"""From this number on, a bare multiplier is taken for PEFT's `lora_alpha`, whose usual values are 8 to 512."""


def multiplier_rule(
    alpha: AlphaRule | float | str, lora_alpha: float | None = None, use_rslora: bool = False
) -> AlphaRule:
    """The multiplier's rule from what people write.

    Args:
        alpha: A rule, or a number or text as `AlphaRule.parse` reads it.
        lora_alpha: PEFT's setting, which counts instead of `alpha`: the multiplier is `lora_alpha / r`.
        use_rslora: Whether it is `lora_alpha / √r`.

    Raises:
        UserError: There is no such rule, both settings are given, or `alpha` is a number as large as `lora_alpha` is.
    """
    try:
        if lora_alpha is None:
            rule = alpha if isinstance(alpha, AlphaRule) else AlphaRule.parse(str(alpha))
        elif alpha in (ALPHA_ONE, "1", 1):
            return AlphaRule(lora_alpha, 0.5 if use_rslora else 1.0)
        else:
            raise ValueError("alpha and lora_alpha exclude each other: give one of them.")
    except ValueError as error:
        raise UserError(str(error)) from None
    if not isinstance(alpha, AlphaRule) and "r" not in str(alpha) and rule.constant >= LEAST_LORA_ALPHA:
        number = f"{rule.constant:g}"
        raise UserError(
            f"alpha = {number} multiplies B A by {number} at every rank; PEFT's lora_alpha = {number} is the "
            f"multiplier {number}/r: give lora_alpha ({number}), or {number}*r^-0 for alpha if that is what is meant."
        )
    return rule


@dataclass(frozen=True)
class AdapterSpec:
    """A LoRA of some rank, initialisation and multiplier; full finetuning (`FFT`) is one value of it.

    Attributes:
        rank: r; `None` for full finetuning.
        scheme: Init[A], Init[B], or FFT.
        alpha: The multiplier's rule α(r); it has no meaning for FFT.

    Raises:
        ValueError: The rank and the scheme contradict each other, or the rank is below 1.
    """

    rank: int | None
    scheme: Scheme = Scheme.INIT_B
    alpha: AlphaRule = ALPHA_ONE

    def __post_init__(self) -> None:
        if (self.rank is None) != (self.scheme is Scheme.FFT):
            raise ValueError("a LoRA configuration needs a rank, and full finetuning (FFT) has none.")
        if self.rank is not None and self.rank < 1:
            raise ValueError(
                f"a LoRA needs a rank of at least 1, not {self.rank}; full finetuning is rank 0 or 'full'."
            )

    @classmethod
    def parse(cls, rank: int | None, init: str = "B", alpha: str = "1") -> "AdapterSpec":
        """Read a rank (`None`: full finetuning), "A" or "B", and a multiplier as `AlphaRule.parse` reads it.

        Raises:
            UserError: One of them cannot be read.
        """
        if rank is None:
            return FFT
        if init not in ("A", "B"):
            raise UserError(
                f"the initialisation {init!r} is not one of A and B: others, PiSSA and OLoRA among them, shift "
                "the base weights or have no learning-rate rule."
            )
        try:
            return cls(rank, Scheme(f"Init[{init}]"), AlphaRule.parse(alpha))
        except ValueError as error:
            raise UserError(str(error)) from None

    @property
    def init(self) -> str:
        """ "A" or "B"; "" for full finetuning."""
        return "" if self.rank is None else self.scheme.value[5]

    def as_dict(self) -> dict[str, int | str | None]:
        """Rank, initialisation and multiplier as text, which `parse` reads."""
        return {"rank": self.rank, "init": self.init, "alpha": "" if self.rank is None else str(self.alpha)}

    @property
    def scheme_label(self) -> str:
        """The specification without its rank, for tables and figures: "Init[B] α=1", or "FFT"."""
        return "FFT" if self.rank is None else f"{self.scheme.value} α={self.alpha}"

    @property
    def label(self) -> str:
        """The specification for tables and figures: "Init[B] α=1 r=8", or "FFT"."""
        return "FFT" if self.rank is None else f"{self.scheme_label} r={self.rank}"

    @property
    def file_name(self) -> str:
        """The specification as a part of a file's name: "r8-B-1", or "full"."""
        return re.sub(r"[^\w.-]+", "-", f"r{self.rank}-{self.init}-{self.alpha}") if self.rank else "full"

    def __str__(self) -> str:
        return "FFT" if self.rank is None else f"LoRA {self.scheme.value}, α = {self.alpha}, r = {self.rank}"


FFT = AdapterSpec(None, Scheme.FFT)
"""Full finetuning: every weight of the model is trained."""
