"""GRPO trials for docs/predictions.md: LoRA trials side by side, whatever their kind, full ones one after another.

    python scripts/law_grpo.py --output runs/law/e2.csv --curve B,1,1:-11:-7.5:0.5:1+2 --curve B,4,1:-12:-8.5:0.5:1+2
    python scripts/law_grpo.py --output runs/law/e9.csv --curve full-bf16:-16:-11:1:1
    python scripts/law_grpo.py --model embedded --steps 4 --output /tmp/e.csv --curve peft,8,32/r:-8:-7:1:1   # a CPU

A curve is KIND[,RANK,ALPHA]:FIRST:LAST:STEP:SEEDS, with learning rates from 2^FIRST to 2^LAST. Kinds:

    A, B        LoRA with Init[A] or Init[B]
    peft        LoRA with PEFT's default init: A uniform with variance 1/(3n), B = 0
    full        FFT in fp32 (bf16 autocast on a GPU)
    full-mlp    FFT of the MLP projections alone
    full-bf16   FFT with weights, gradients and moments in bf16

The CSV is a sweep's (`mua_rl.analysis.rows`), with the kind, where a sweep knows no such, in the base's name
(`smollm2-peft`); beside it is a line of JSON for each run with the reward, loss and gradient norm of every step.
Runs that the CSV has are not repeated.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn

from mua_rl.adapter.adapters import Adapter, LoRA, adapter_for
from mua_rl.adapter.targets import MLP_PROJECTIONS, TargetModules
from mua_rl.analysis.rows import SweepRow, append, read
from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.stacked import trainer as stacked
from mua_rl.grpo.stacked.memory import BatchLimits
from mua_rl.lr.spec import FFT, AdapterSpec
from mua_rl.run.machine import machine
from mua_rl.run.trial import Trial, TrialResult

FULL = {"full": "", "full-mlp": "-mlp", "full-bf16": "-bf16"}
"""Kinds of FFT, and what is added to the base's name."""
LORA = {"A": "", "B": "", "peft": "-peft"}


class PEFTLoRA(LoRA):
    """A LoRA with PEFT's default init."""

    @torch.no_grad()
    def draw(self, a: torch.Tensor, b: torch.Tensor, generator: torch.Generator, experts: int = 1) -> None:
        """See `LoRA.draw`."""
        b.zero_()
        a.copy_((2 * torch.rand(a.shape, generator=generator) - 1) / math.sqrt(a.shape[1]))


def peft_adapter(spec: AdapterSpec, target_modules: TargetModules) -> Adapter:
    """As `adapter_for`, with PEFT's default init."""
    assert spec.rank is not None
    return PEFTLoRA(spec.rank, spec.init, spec.alpha, target_modules)


class FullStack:
    """One model's own weights in the place of one trial's A and B (`mua_rl.grpo.stacked.stack.LoRAStack`).

    Args:
        model: Its trained weights become views into one vector.
        is_trained: By a weight's name.
    """

    def __init__(self, model: nn.Module, is_trained: Callable[[str], bool]) -> None:
        model.requires_grad_(False)
        weights = [weight for name, weight in model.named_parameters() if is_trained(name)]
        self.values = torch.cat([weight.data.flatten() for weight in weights])[None]
        self.gradients = torch.zeros_like(self.values)
        self.active = [0]
        start = 0
        for weight in weights:
            end = start + weight.numel()
            weight.data = self.values[0, start:end].view(weight.shape)
            weight.requires_grad_(True)
            weight.grad = self.gradients[0, start:end].view(weight.shape)
            start = end

    def keep(self, trials: Sequence[int]) -> None:
        """See `LoRAStack.keep`."""
        self.active = list(trials)
        self.values, self.gradients = self.values[: len(trials)], self.gradients[: len(trials)]


class FullRun(stacked.StackedTrainer):
    """GRPO with FFT in the same engine as stacked trials."""

    def _precast(self) -> None:
        """Nothing: trained weights stay as they are."""


def train_full(arguments: Any, trial: Trial, kind: str, limits: BatchLimits) -> list[Any]:
    """One run of FFT."""
    projections = tuple(f"{name}.weight" for family in MLP_PROJECTIONS for name in family)

    def stack(model: nn.Module, *_: Any) -> FullStack:
        return FullStack(model, lambda name: kind != "full-mlp" or name.endswith(projections))

    with mock.patch.object(stacked, "LoRAStack", stack), mock.patch.object(stacked, "check"):
        trainer = FullRun(arguments, [trial], limits=limits)
    return train(trainer)


def train_lora(arguments: Any, trials: Sequence[Trial], kind: str, limits: BatchLimits) -> list[Any]:
    """LoRA trials of a kind side by side."""
    with mock.patch.object(stacked, "adapter_for", peft_adapter if kind == "peft" else adapter_for):
        trainer = stacked.StackedTrainer(arguments, trials, limits=limits)
    return train(trainer)


def train(trainer: stacked.StackedTrainer) -> list[Any]:
    """Results and histories of all trials."""
    states = list(trainer.states)
    start = time.perf_counter()

    def on_step(step: int, _: Any) -> None:
        if step % 10 == 0 or step == 1:
            phases = {name: round(seconds, 1) for name, seconds in trainer.phases.items()}
            print(f"step {step}, {time.perf_counter() - start:.1f} s: {phases}", flush=True)

    results = trainer.train(on_step)
    return [(result, state.history) for result, state in zip(results, states, strict=True)]


def curve_trials(text: str) -> tuple[str, list[Trial]]:
    """The kind of a `--curve`, and its trials.

    Raises:
        UserError: It is none.
    """
    try:
        curve, first, last, step, seeds = text.split(":")
        kind, *rest = curve.split(",")
        lrs = [float(first) + i * float(step) for i in range(round((float(last) - float(first)) / float(step)) + 1)]
        numbers = [int(seed) for seed in seeds.split("+")]
        if kind in FULL:
            spec = FFT
        else:
            rank, alpha = rest
            spec = AdapterSpec.parse(int(rank), {"A": "A", "B": "B", "peft": "A"}[kind], alpha)
        return kind, [Trial(spec, lr, seed) for lr in lrs for seed in numbers]
    except (ValueError, KeyError):
        raise UserError(f"--curve is KIND[,RANK,ALPHA]:FIRST:LAST:STEP:SEEDS, not {text!r}.") from None


def groups(
    curves: Sequence[str], per_group: int, is_done: Callable[[str, Trial], bool]
) -> list[tuple[str, list[Trial]]]:
    """What is trained together: LoRA trials of a kind up to a number, in the order of the curves; FFT's singly."""
    made: list[tuple[str, list[Trial]]] = []
    waiting: dict[str, list[Trial]] = {}
    for kind, trials in map(curve_trials, curves):
        todo = [trial for trial in trials if not is_done(kind, trial)]
        if kind in FULL:
            made += [(kind, [trial]) for trial in todo]
        else:
            # Init[A] and Init[B] may share a group: their rows are of one base in the CSV.
            waiting.setdefault("B" if kind == "A" else kind, []).extend(todo)
    for kind, trials in waiting.items():
        number = -(-len(trials) // per_group)
        size = -(-len(trials) // max(1, number))
        made += [(kind, trials[i : i + size]) for i in range(0, len(trials), max(1, size))]
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="as python -m mua_rl.grpo takes it")
    parser.add_argument("--name", default=None, help="of the base in the CSV; default: --model")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--label", default="", help="added to the task's name in the CSV")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--curve", action="append", required=True)
    parser.add_argument("--per-group", type=int, default=20, help="LoRA trials side by side")
    parser.add_argument("--completions", type=int, default=256, help="of a step")
    parser.add_argument("--micro-batch", type=int, default=128, help="completions in a pass")
    parser.add_argument("--at-once", type=int, default=256, help="completions of a trial that are written at once")
    parser.add_argument("--pass-tokens", type=int, default=12288)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("flags", nargs="*", help="after --: more flags of mua_rl.grpo")
    options = parser.parse_args()
    task = "-".join(filter(None, [options.task.partition(":")[0], options.label]))
    name = options.name or options.model
    limits = BatchLimits(options.at_once, options.pass_tokens)

    def base(kind: str) -> str:
        return name + {**FULL, **LORA}[kind]

    rows = read(options.output) if options.output.exists() else []
    done = {(row.base, row.trial) for row in rows}
    for kind, trials in groups(options.curve, options.per_group, lambda k, trial: (base(k), trial) in done):
        start = time.monotonic()
        flags = ["--model", options.model, "--task", options.task, "--max_steps", options.steps]
        flags += ["--held_out_steps", 0, "--save_strategy", "no", "--report_to", "none"]
        flags += ["--per_device_train_batch_size", options.micro_batch]
        flags += ["--gradient_accumulation_steps", options.completions // options.micro_batch]
        if kind == "full-bf16":
            flags += ["--dtype", "bfloat16", "--bf16", "false"]
        arguments, _, _ = parse([str(flag) for flag in [*flags, *options.flags]])
        if kind in FULL:
            trained = train_full(arguments, trials[0], kind, limits)
        else:
            trained = train_lora(arguments, trials, kind, limits)
        results: list[TrialResult] = [result for result, _ in trained]
        rows = [SweepRow("grpo", task, base(kind), t, r, machine()) for t, r in zip(trials, results, strict=True)]
        append(options.output, rows)
        with open(options.output.with_suffix(".jsonl"), "a", encoding="utf-8") as stream:
            for row, (_, history) in zip(rows, trained, strict=True):
                kept = {key: [round(step[key], 5) for step in history] for key in ("reward", "loss", "grad_norm")}
                stream.write(json.dumps({"task": task, "base": row.base, **row.trial.as_dict(), **kept}) + "\n")
        for row in rows:
            print(f"{row.base} {row.trial.name}: {row.result.score:.3f}, reward {row.result.reward_mean:.3f}")
        memory = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
        print(f"{len(trials)} runs in {time.monotonic() - start:.0f} s, {memory:.1f} GiB", flush=True)


if __name__ == "__main__":
    run_command(main)
