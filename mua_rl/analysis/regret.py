"""What full finetuning (FFT) loses at the learning rate that a rule takes from a tuned LoRA, and what the tuning cost.

Beside the transfer rules (`mua_rl.analysis.predictions`) stand those that people use instead, `HABITS`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mua_rl.analysis.measured import Context, Measured, Sweep
from mua_rl.analysis.predictions import Prediction, Rule
from mua_rl.lr.spec import FFT, AdapterSpec


@dataclass(frozen=True)
class DividedByTen:
    """FFT's learning rate is a tenth of LoRA's, as Tinker's cookbook has it, whose LoRA begins with B at zero."""

    name: str = "LoRA ÷ 10"
    needs_source: bool = True

    def predict(self, source: Measured, target: AdapterSpec, context: Context) -> Prediction | None:
        """See `Rule`."""
        applies = source.spec.init == "A" and target == FFT
        return Prediction(source.optimum.log2_lr - math.log2(10)) if applies else None


@dataclass(frozen=True)
class Unchanged:
    """FFT at the learning rate of a LoRA with PEFT's initialisation and `lora_alpha = 2r`.

    PEFT's A is Kaiming-uniform, of a third of Init[A]'s variance; the nearest curve of a sweep is Init[A] with α = 2.
    """

    name: str = "LoRA unchanged (Init[A] α=2)"
    needs_source: bool = True

    def predict(self, source: Measured, target: AdapterSpec, context: Context) -> Prediction | None:
        """See `Rule`."""
        return (
            Prediction(source.optimum.log2_lr)
            if (source.spec.init, str(source.spec.alpha)) == ("A", "2") and target == FFT
            else None
        )


@dataclass(frozen=True)
class Fixed:
    """FFT at one learning rate, whatever the model."""

    learning_rate: float = 1e-6
    needs_source: bool = False

    @property
    def name(self) -> str:
        """See `Rule`."""
        return f"always {self.learning_rate:g}"

    def predict(self, source: Measured, target: AdapterSpec, context: Context) -> Prediction | None:
        """See `Rule`."""
        return Prediction(math.log2(self.learning_rate)) if target == FFT else None


HABITS: tuple[Rule, ...] = (DividedByTen(), Unchanged(), Fixed())
"""What people do instead."""


@dataclass(frozen=True, eq=False)
class Regret:
    """What FFT loses at a transferred learning rate.

    Attributes:
        rule: Its name.
        sweep: Of what.
        source: The curve that was tuned; `None` for a rule that needs none.
        log2_lr: Where FFT is run.
        share: Of the gain (FFT's best less the value before training) that is lost there, by FFT's fitted curve; all
            of it where FFT diverged, and in between the share of the way from the last that survived.
        is_bound: Whether the learning rate is outside FFT's grid: then `share` is of the grid's end, and at least that.
        within_noise: Whether FFT's value there cannot be told from its best.
        steps, seconds: Cost of tuning the source, as a share of what FFT's own sweep cost.
    """

    rule: str
    sweep: Sweep
    source: Measured | None
    log2_lr: float
    share: float
    is_bound: bool
    within_noise: bool
    steps: float
    seconds: float


def regrets(sweeps: Sequence[Sweep], rule: Rule) -> list[Regret]:
    """FFT's loss at the learning rate that a rule takes from each LoRA curve, in sweeps that have FFT."""
    found = []
    for sweep in sweeps:
        fft, loras = sweep.fft, [m for m in sweep.curves.values() if m.spec != FFT]
        if fft is None:
            continue
        for source in loras if rule.needs_source else [fft]:
            prediction = rule.predict(source, FFT, sweep.context)
            if prediction is not None:
                found.append(_regret(rule, sweep, fft, source if rule.needs_source else None, prediction.log2_lr))
    return found


def _regret(rule: Rule, sweep: Sweep, fft: Measured, source: Measured | None, log2_lr: float) -> Regret:
    steps, seconds = source.cost_beside(fft) if source else (0.0, 0.0)
    return Regret(
        rule=rule.name,
        sweep=sweep,
        source=source,
        log2_lr=log2_lr,
        share=fft.share_lost(log2_lr),
        is_bound=not fft.optimum.covers(log2_lr) and not log2_lr >= fft.cliff,
        within_noise=fft.optimum.is_as_good(log2_lr),
        steps=steps,
        seconds=seconds,
    )
