"""Benchmark an LR sweep by GRPO: K stacked trials in one process against K runs of `python -m mua_rl.grpo` in sequence.

Both do the same steps of the same trials, start-up included, in one invocation. On a GPU:

    python scripts/bench_sweep.py --model smollm2 --steps 60 --k 8 --singles 2 --out folder

In miniature on a CPU:

    python scripts/bench_sweep.py --model embedded --steps 10 --k 4 --singles 1 --out folder

Flags after `--` go to both sides, as in `-- --num_generations 4`.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from mua_rl.exits import run_command
from mua_rl.grpo.stacked.memory import TIMES_ONE_RUN, BatchLimits
from mua_rl.lm.models import model_path
from mua_rl.lr.record import package_versions
from mua_rl.lr.spec import AdapterSpec
from mua_rl.rollouts.memory import TrainerMemory
from mua_rl.run.machine import machine
from mua_rl.run.trial import Trial

TOP = {"embedded": -9.0, "smollm2": -11.5}
"""log2 of the largest learning rate, by model; the others follow in half octaves downwards."""

TOGETHER = "together"


def main() -> None:
    """Run both sides and compare."""
    given = sys.argv[1:]
    ours, passed = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--k", type=int, default=8, help="the number of trials")
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--top", type=float, help="log2 of the largest learning rate")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--singles", type=int, help="time only so many single runs and multiply; default: all")
    parser.add_argument("--memory", type=float, default=TIMES_ONE_RUN, help="the memory of all trials, in runs")
    parser.add_argument(
        "--limits",
        type=int,
        nargs=2,
        metavar=("COMPLETIONS", "TOKENS"),
        help="instead of planned from the memory: completions of each trial at once, tokens of all trials in a pass",
    )
    parser.add_argument("--use_vllm", action="store_true", help="rollouts from a vLLM engine, on both sides")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(ours)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        result = together(options, passed) if options.child == TOGETHER else single(int(options.child), options, passed)
        (options.out / f"{options.child}.json").write_text(
            json.dumps({**result, **peaks()}, indent=2) + "\n", encoding="utf-8"
        )
        return
    model_path(options.model)  # an alias is made once, outside of what is timed
    singles = options.k if options.singles is None else min(options.singles, options.k)
    picked = [round(i * (options.k - 1) / max(1, singles - 1)) for i in range(singles)]  # spread over the rates
    results = {name: run_child(name, options.out) for name in (TOGETHER, *map(str, picked))}
    report = compare(results, options, passed)
    (options.out / "bench_sweep.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, options.out / "bench_sweep.png")
    print(table(report))


def trials(options: argparse.Namespace) -> list[Trial]:
    """The trials of the sweep, the largest learning rate first."""
    top = TOP.get(options.model, TOP["smollm2"]) if options.top is None else options.top
    return [Trial(AdapterSpec(options.rank), top - k / 2, options.seed) for k in range(options.k)]


def flags(options: argparse.Namespace, passed: list[str]) -> list[str]:
    """What both sides are told."""
    engine = ["--use_vllm"] if options.use_vllm else []
    return ["--model", options.model, "--max_steps", str(options.steps), "--report_to", "none", *engine, *passed]


def run_child(name: str, out: Path) -> dict[str, Any]:
    """One side in a process of its own, from start to end; its output goes to a file beside the result."""
    command = [sys.executable, __file__, "--child", name, *sys.argv[1:]]
    load = os.getloadavg()[0]
    start = time.perf_counter()
    with open(out / f"{name}.log", "w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    seconds = time.perf_counter() - start
    print(f"{name}: {seconds:.1f} s, exit code {code}", flush=True)
    if code:
        print("".join((out / f"{name}.log").read_text(encoding="utf-8").splitlines(keepends=True)[-15:]))
        sys.exit(1)
    return {**json.loads((out / f"{name}.json").read_text(encoding="utf-8")), "wall": seconds, "load before": load}


def together(options: argparse.Namespace, passed: list[str]) -> dict[str, Any]:
    """All trials side by side."""
    import dataclasses

    from mua_rl.grpo.arguments import parse
    from mua_rl.grpo.stacked.trainer import StackedTrainer

    arguments, _, _ = parse(flags(options, passed))
    limits = BatchLimits(*options.limits) if options.limits else None
    trainer = StackedTrainer(arguments, trials(options), memory=options.memory, limits=limits)
    print(f"{trainer.limits}, MiB as planned: {mebibytes(trainer.expected_memory)}", flush=True)
    ends: list[float] = []
    histories: dict[int, list[dict[str, float]]] = {k: [] for k in range(options.k)}

    def on_step(step: int, metrics: dict[int, dict[str, float]]) -> None:
        ends.append(time.perf_counter())
        for number, values in metrics.items():
            histories[number].append(values)
        print(step, f"{ends[-1] - ends[0]:.1f} s", [round(values["reward"], 3) for values in metrics.values()])

    results = trainer.train(on_step)
    return {
        "trials": [trial.as_dict() for trial in trainer.trials],
        "results": [result.as_dict() for result in results],
        "histories": list(histories.values()),
        "step ms": 1000 * (ends[-1] - ends[0]) / max(1, len(ends) - 1),
        "phases ms": {name: 1000 * seconds / len(ends) for name, seconds in trainer.phases.items()},
        "limits": dataclasses.asdict(trainer.limits),
        "planned MiB": mebibytes(trainer.expected_memory),
        "planned MiB of one run": mebibytes(trainer.one_run),
    }


def mebibytes(memory: TrainerMemory) -> dict[str, int]:
    """Sizes by part, and their sum."""
    return {name: round(size / 2**20) for name, size in {**memory.parts(), "total": memory.total}.items()}


def single(number: int, options: argparse.Namespace, passed: list[str]) -> dict[str, Any]:
    """One trial as its own run."""
    from mua_rl.grpo import run as grpo
    from mua_rl.grpo.arguments import parse
    from mua_rl.run.folder import RunFolder

    trial, folder = trials(options)[number], options.out / f"run-{number}"
    given = ["--rank", str(trial.spec.rank), "--lr", repr(trial.learning_rate), "--seed", str(trial.seed)]
    given += ["--held_out_steps", "0", "--save_strategy", "no", "--output_dir", str(folder)]
    grpo.train(*parse([*given, *flags(options, passed)]))
    lines = [line for line in RunFolder(folder).metrics() if "loss" in line]
    result = RunFolder(folder).result()
    assert result is not None
    return {"history": lines, "result": result.as_dict(), "step ms": 1000 * result.seconds / options.steps}


def peaks() -> dict[str, Any]:
    """Peak memory of this process in GiB, and the device that it ran on."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "peak GPU GiB": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "peak GPU GiB reserved": torch.cuda.max_memory_reserved() / 2**30 if cuda else None,
        "peak RSS GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "device": machine(),
        "threads": torch.get_num_threads(),
    }


def compare(results: dict[str, dict[str, Any]], options: argparse.Namespace, passed: list[str]) -> dict[str, Any]:
    """Everything that was measured, and the ratios."""
    side_by_side = results[TOGETHER]
    alone = {name: result for name, result in results.items() if name != TOGETHER}
    report: dict[str, Any] = {
        "k": options.k,
        "steps": options.steps,
        "model": options.model,
        "passed on": passed,
        "machine": f"{side_by_side['device']}, {platform.platform()}",
        "versions": package_versions(),
        "side by side": side_by_side,
        "single": alone,
    }
    if alone:
        walls = [result["wall"] for result in alone.values()]
        report["single runs timed"] = len(walls)
        report["single runs wall"] = sum(walls) / len(walls) * options.k
        report["times faster"] = report["single runs wall"] / side_by_side["wall"]
        report["in times of one run"] = side_by_side["wall"] / (sum(walls) / len(walls))
        memory = "peak GPU GiB" if side_by_side["peak GPU GiB"] else "peak RSS GiB"
        report["memory in runs"] = side_by_side[memory] / max(result[memory] for result in alone.values())
    return report


def table(report: dict[str, Any]) -> str:
    """The comparison in a few lines."""
    ours, lines = report["side by side"], [f"{report['machine']}; {report['model']}, {report['steps']} steps"]

    def row(name: str, result: dict[str, Any], wall: float) -> str:
        memory = result["peak GPU GiB"] or result["peak RSS GiB"]
        return f"{name:<28}{wall:9.1f} s{result['step ms']:9.0f} ms a step{memory:8.2f} GiB"

    lines.append(row(f"{report['k']} trials side by side", ours, ours["wall"]))
    lines.append("  of a step: " + ", ".join(f"{name} {value:.0f} ms" for name, value in ours["phases ms"].items()))
    lines.append("  planned: " + ", ".join(f"{name} {size}" for name, size in ours["planned MiB"].items()) + " MiB")
    for name, result in report["single"].items():
        lines.append(row(f"single run of trial {name}", result, result["wall"]))
    if report["single"]:
        timed, count = report["single runs timed"], report["k"]
        how = "" if timed == count else f", {timed} of them timed and multiplied"
        lines.append(f"{count} single runs in sequence{how}: {report['single runs wall']:.1f} s")
        lines.append(
            f"side by side: {report['times faster']:.2f} times faster, {report['in times of one run']:.2f} times one "
            f"run's time, {report['memory in runs']:.2f} times its memory"
        )
    for number, (trial, result) in enumerate(zip(ours["trials"], ours["results"], strict=True)):
        alone = report["single"].get(str(number))
        beside = f"; alone {alone['result']['score']:.3f}" if alone else ""
        lines.append(
            f"lr 2^{trial['log2_lr']:g}: accuracy {result['score']:.3f} ± {result['standard_error']:.3f}{beside}"
        )
    return "\n".join(lines)


def draw(report: dict[str, Any], path: Path) -> None:
    """Reward curves: trials side by side as lines, the single runs as dots of the same colour."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    ours = report["side by side"]
    for number, (trial, history) in enumerate(zip(ours["trials"], ours["histories"], strict=True)):
        colour = colormaps["viridis"](number / max(1, report["k"] - 1))
        label = f"2^{trial['log2_lr']:g}"
        axes.plot(range(1, len(history) + 1), [line["reward"] for line in history], color=colour, label=label)
        if alone := report["single"].get(str(number)):
            points = [(line["step"], line["reward"]) for line in alone["history"]]
            axes.plot(*zip(*points, strict=True), ".", color=colour, label=f"{label} alone")
    axes.set(xlabel="optimizer step", ylabel="training reward", title=f"{report['model']}, {report['machine']}")
    axes.title.set_fontsize(8)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, ncols=2)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    run_command(main)
