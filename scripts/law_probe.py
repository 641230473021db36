"""E1 of docs/predictions.md: m_eff, n_eff, F and ρ of a policy, from one backward pass on each of a few batches.

    python scripts/law_probe.py --model smollm2 --output runs/law/probe-smollm2.csv
    python scripts/law_probe.py --model embedded --batches 2 --prompts 8 --output runs/law/probe.csv     # on a CPU

A batch is what a step of GRPO has: prompts × completions at temperature 1, of which those without advantage have no
gradient. One line of the CSV is one batch; beside the CSV, one line for each layer.
"""

import argparse
import csv
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mua_rl.adapter.targets import targeted_layers
from mua_rl.envs.tasks import Task, get_task
from mua_rl.exits import run_command
from mua_rl.lm import models
from mua_rl.probes.gradient import Probe, coherence, gradients_of
from mua_rl.probes.movement import probe_batch
from mua_rl.run.machine import machine

DRAWN = (4, 16, 64)
"""Ranks of the drawn A and B."""


def batch_task(task: Task, number: int, prompts: int) -> Task:
    """A task whose training rows are those of one batch alone."""

    def rows(conversational: bool) -> Any:
        every = task.train(conversational).shuffle(seed=7)
        return every.select(range(number * prompts, (number + 1) * prompts))

    return replace(task, train=rows)


@torch.no_grad()
def drawn_sums(gradients: dict[str, torch.Tensor], targets: list[str], seed: int) -> dict[str, float]:
    """m_eff and n_eff as drawn B and A of several ranks imply them."""
    entries = sum(float(gradients[name].abs().sum()) for name in targets)
    found: dict[str, float] = {}
    for rank in DRAWN:
        generator = torch.Generator().manual_seed(seed)
        of_b = of_a = of_peft = 0.0
        for name in targets:
            g = gradients[name].float()
            m, n = g.shape
            b = torch.randn(m, rank, generator=generator).to(g) / math.sqrt(rank)
            a = torch.randn(rank, n, generator=generator).to(g) / math.sqrt(n)
            peft = (torch.rand(rank, n, generator=generator).to(g) * 2 - 1) / math.sqrt(n)  # var 1/(3n)
            of_b += float((b.mT @ g).abs().sum())
            of_a += float((g @ a.mT).abs().sum())
            of_peft += float((g @ peft.mT).abs().sum())
        found |= {f"m_eff_{rank}": rank * (entries / of_b) ** 2, f"n_eff_{rank}": rank * entries / of_a}
        found[f"n_eff_peft_{rank}"] = rank * entries / of_peft
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--target-modules", default="mlp")
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=None)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model: Any = models.load_model(options.model)
    model.to(device).eval()
    tokenizer, task = models.load_tokenizer(options.model), get_task(options.task)
    targets = [f"{name}.weight" for name, _ in targeted_layers(model, options.target_modules)]
    options.output.parent.mkdir(parents=True, exist_ok=True)
    rows, layers, before = [], [], None
    for number in range(options.batches):
        start = time.perf_counter()
        batch = probe_batch(
            model, tokenizer, batch_task(task, number, options.prompts), options.prompts, 8, options.new_tokens, number
        )
        rolled = time.perf_counter()
        gradients = gradients_of(model, batch)
        probe = Probe.of(gradients, targets)
        signs = [gradients[name].sign().to(torch.int8) for name in targets]
        row = {
            "model": options.model, "task": options.task, "batch": number, "completions": len(batch.ids),
            "m_eff": probe.m_eff, "n_eff": probe.n_eff, "F": probe.full_share,
            "rho": coherence(before, signs) if before else math.nan,
            **drawn_sums(gradients, targets, number),
            "norm": float(torch.stack([g.norm() for g in gradients.values()]).norm()),
            "rollout_seconds": rolled - start, "probe_seconds": time.perf_counter() - rolled, "machine": machine(),
        }  # fmt: skip
        before = signs
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        rows.append(row)
        layers += [{"batch": number, **vars(layer)} for layer in probe.layers]
        everything = {n: float(g.abs().sum()) for n, g in gradients.items() if n not in set(targets)}
        for kind in sorted({n.split(".")[-2] for n in everything}):
            size = sum(v for n, v in everything.items() if n.split(".")[-2] == kind)
            layers.append({"batch": number, "name": f"all {kind}", "entries": size})
        write(options.output, rows)
        write(options.output.with_suffix(".layers.csv"), layers)


def write(path: Path, rows: list[dict]) -> None:
    """A CSV of dictionaries with the columns of the first."""
    with open(path, "w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run_command(main)
