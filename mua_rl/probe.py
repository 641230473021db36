"""`python -m mua_rl.probe MODEL --from peft,16,32/r --to full`: two learning rates' ratio from a model's own gradient.

The gradient of GRPO's loss on two batches of the model's own completions says how much a first step of Adam gains under
each configuration (`mua_rl.probes.gradient`, docs/theory.md). The ratio is that of the learning rates at which the two
gain the same. How such ratios fared where they were measured is printed with it.
"""

import argparse
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mua_rl.adapter.targets import TargetModules, targeted_layers
from mua_rl.envs.tasks import get_task
from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.flags import FlagParser
from mua_rl.lm import models
from mua_rl.lr.rank import FULL_WORDS
from mua_rl.lr.record import check_learning_rate
from mua_rl.lr.spec import FFT, AdapterSpec
from mua_rl.probes.gradient import Probe, coherence, gradients_of
from mua_rl.probes.movement import probe_batch

EPILOG = """examples:
  python -m mua_rl.probe embedded --from B,32,1 --to full
  python -m mua_rl.probe smollm2 --from peft,16,32/r --lr 1e-4 --to full

a configuration is full, or INIT,RANK,ALPHA: INIT is A, B or peft (PEFT's default, A uniform with variance 1/(3n)),
ALPHA the multiplier of B A (1, 1/r; PEFT's lora_alpha = 32 is 32/r)"""


@dataclass(frozen=True)
class Side:
    """A configuration, and whether its Init[A] has PEFT's variance."""

    spec: AdapterSpec
    peft_init: bool = False

    def __str__(self) -> str:
        return f"{self.spec}{' (the default init of PEFT)' if self.peft_init else ''}"


def parse_side(text: str) -> Side:
    """A configuration as the command line has it.

    Raises:
        UserError: The text is none.
    """
    parts = text.split(",")
    if len(parts) == 1 and text.strip().lower() in FULL_WORDS:
        return Side(FFT)
    if len(parts) != 3:
        raise UserError(f"a configuration is full, or INIT,RANK,ALPHA as in peft,16,32/r, and not {text!r}.")
    init, rank, alpha = (part.strip() for part in parts)
    peft_init = init == "peft"
    if not rank.isdecimal() or int(rank) < 1:
        raise UserError(f"{text!r} has no rank from 1 on; full finetuning is full alone.")
    return Side(AdapterSpec.parse(int(rank), "A" if peft_init else init, alpha), peft_init)


def probes_of(
    model: Any, tokenizer: Any, task_name: str, target_modules: TargetModules, prompts: int, batches: int
) -> tuple[list[Probe], list[float]]:
    """The probe of each of a few batches, and ρ of each pair of neighbours.

    Raises:
        UserError: The model has no such layers, or the task gives no reward that differs.
    """
    task = get_task(task_name)
    targets = [f"{name}.weight" for name, _ in targeted_layers(model, target_modules)]
    probes, coherences, before = [], [], None
    for number in range(batches):
        gradients = gradients_of(model, probe_batch(model, tokenizer, task, prompts, seed=number))
        probes.append(Probe.of(gradients, targets))
        signs = [gradients[name].sign().to(torch.int8) for name in targets]
        if before:
            coherences.append(coherence(before, signs))
        before = signs
    return probes, coherences


def ratio(probe: Probe, source: Side, target: Side) -> float:
    """η_target / η_source at which a first step gains the same.

    Raises:
        UserError: A rank is larger than a layer.
    """
    smallest = min(min(layer.outputs, layer.inputs) for layer in probe.layers)
    for side in (source, target):
        if side.spec.rank is not None and side.spec.rank > smallest:
            raise UserError(f"r = {side.spec.rank} is above {smallest}, the smallest side of the model's layers.")
    return probe.gain(source.spec, source.peft_init) / probe.gain(target.spec, target.peft_init)


def worth(source: Side, target: Side) -> str:
    """How such a ratio fared where it was measured (docs/results/law), in a sentence or two."""
    sides = (source, target)
    unlike = any(side.spec.rank and str(side.spec.alpha) != ("32/r" if side.peft_init else "1") for side in sides)
    if unlike:
        return "it was not measured with such a multiplier, and is no prediction to rely on."
    kinds = {"FFT" if side.spec == FFT else "peft" if side.peft_init else side.spec.init for side in sides}
    if kinds == {"B"}:
        return (
            "between ranks of Init[B] it is r^-1/2: SmolLM2's optima from r = 1 to 256 were within 0.4 octaves of that "
            "(E2, E7; the intervals are wider)."
        )
    if kinds == {"B", "FFT"}:
        return (
            "on SmolLM2 it put FFT an octave too low, from r = 4, 64 and 256 alike (E7): m_eff and F are not the "
            "constants. The rule in use, python -m mua_rl.lr, was nearer."
        )
    if kinds == {"peft", "FFT"}:
        return (
            "on SmolLM2 it put FFT 0.9 to 1.3 octaves too low, from r = 8, 32 and 128 (E3b): no prediction to rely on."
        )
    return "it was not measured for this pair, and is no prediction to rely on."


def at_least(text: str) -> int:
    """A number of prompts or batches from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"takes a number from 1 on, not {text}")
    return number


def report(probes: Sequence[Probe], coherences: Sequence[float], source: Side, target: Side, lr: float | None) -> str:
    """What is printed."""
    numbers = [("m_eff", [p.m_eff for p in probes]), ("n_eff", [p.n_eff for p in probes])]
    numbers += [("F", [p.full_share for p in probes]), ("rho", list(coherences))]
    lines = [
        f"{name:6} {statistics.fmean(values):8.4g}   from {min(values):.4g} to {max(values):.4g}"
        for name, values in numbers
        if values
    ]
    ratios = [ratio(probe, source, target) for probe in probes]
    mean = statistics.geometric_mean(ratios)
    batches = f"{min(ratios):.4g} to {max(ratios):.4g} over {len(ratios)} batches"
    lines.append(f"learning rate of {target} / {source}: {mean:.4g} ({math.log2(mean):+.2f} octaves; {batches})")
    if lr is not None:
        lines.append(f"{lr:.4g} becomes {lr * mean:.4g}")
    lines.append(f"how it fared: {worth(source, target)} Sweep around it before you rely on it.")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    parser = FlagParser(
        prog="python -m mua_rl.probe",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", help="embedded, smollm2, a folder or a hub id")
    parser.add_argument("--task", default="arithmetic", help="as python -m mua_rl.grpo takes it")
    parser.add_argument("--from", dest="source", required=True, metavar="CONFIGURATION", help="what was tuned")
    parser.add_argument("--to", required=True, metavar="CONFIGURATION", help="what is to be trained")
    parser.add_argument("--lr", type=float, help="the learning rate that was tuned")
    parser.add_argument("--target_modules", nargs="+", default=["mlp"], help="mlp, all-linear, or names of layers")
    parser.add_argument("--prompts", type=at_least, default=16, help="of a batch, with 8 completions each")
    parser.add_argument("--batches", type=at_least, default=2)
    args = parser.parse_args()
    source, target = parse_side(args.source), parse_side(args.to)
    if args.lr is not None:
        check_learning_rate(args.lr, "--lr")
    model: Any = models.load_model(args.model)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = models.load_tokenizer(args.model)
    modules = args.target_modules if len(args.target_modules) > 1 else args.target_modules[0]
    try:
        probes, coherences = probes_of(model, tokenizer, args.task, modules, args.prompts, args.batches)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{args.model} gives no gradient to read on {args.task}: {error}") from None
    print(report(probes, coherences, source, target, args.lr))


if __name__ == "__main__":
    run_command(main)
