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

from dataclasses import dataclass, field

from mua_rl.lr.spec import ALPHA_ONE, AdapterSpec, Scheme

OWN = "the record's own configuration"
"""How the reader is told that nothing that the rules speak of differs."""


class TransferError(ValueError):
    """The theory does not give the ratio that was asked for; the message says what to do instead."""


@dataclass(frozen=True)
class Configuration:
    """What the best learning rate depends on.

    Attributes:
        spec: What is trained.
        width: n, the largest fan-in among the trained layers (the one that binds: every rule falls with n).
        optimizer: Its name, as in `--optim`; the rules hold for Adam's family.
        lora_plus_ratio: The LR of B over the LR of A; the rules hold at 1 (LoRA+ takes 16, say).
        outputs: m, the smallest fan-out among the trained layers, which bounds the rank of a full update; no rule
            here depends on it (`mua_rl.lr.transfer.rank_correction` does).

    Raises:
        ValueError: The width is below 1, or the rank is above the width.
    """

    spec: AdapterSpec
    width: int
    optimizer: str = "adamw"
    lora_plus_ratio: float = 1.0
    outputs: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"a width is a positive integer, not {self.width}.")
        if self.rank is not None and self.rank > self.width:
            raise ValueError(f"the rank must lie between 1 and the width {self.width}, not at {self.rank}.")

    @property
    def rank(self) -> int | None:
        """r; `None` for full finetuning."""
        return self.spec.rank

    @property
    def scheme(self) -> Scheme:
        """Init[A], Init[B] or FFT."""
        return self.spec.scheme

    @property
    def multiplier(self) -> float | None:
        """α at the rank; `None` for full finetuning."""
        return None if self.rank is None else self.spec.alpha(self.rank)

    def __str__(self) -> str:
        return str(self.spec)


def best_lr_order(configuration: Configuration) -> float:
    """The best learning rate of a configuration up to a constant that is the scheme's own.

    Init[A]: `η = min(1/(α r), (α n r)^(-1/2))`; Init[B]: `η = min(1/(α n), (α n r)^(-1/2))`; FFT: `η = 1/n`.
    """
    n, r, alpha = configuration.width, configuration.rank, configuration.multiplier
    if r is None or alpha is None:
        return 1 / n
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
        if lora.spec.alpha != ALPHA_ONE:
            raise TransferError(
                f"Init[B] shares its learning rate with full finetuning (FFT) at α = 1 only, not at "
                f"α = {lora.spec.alpha}: "
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
        return OWN
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
            ("α", source.multiplier, target.multiplier),
        )
        if before is not None and after is not None and before != after
    ]
    return f"{why}{'; ' + ', '.join(changes) if changes else ''}: times {ratio:.4g}"
