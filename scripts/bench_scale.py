"""GRPO on one and two GPUs: seconds a step by phase, tokens a second, memory.

Each run is a process group of its own with a time limit, one after another. Layouts, on a machine with two GPUs:

    python scripts/bench_scale.py --layouts one ddp fsdp2 server --models smollm2 1.5b --out DIR

`--weak` gives a layout of two training processes twice the completions a step, so that each does what one GPU does in
layout `one`; without it all layouts do the same step. Results stay in the folder, and the table is of all that are
there (how much memory is planned and taken: `bench_memory.py`).

In miniature on a CPU (gloo, no engine; FSDP2 needs GPUs, since accelerate knows it on those alone):

    python scripts/bench_scale.py --layouts one ddp --models embedded --no_engine --steps 6 --completions 32 --out DIR
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench_grpo import PHASES, WARM_UP, Phases, columns, instrument, mean
from random_llama import random_model

from mua_rl.flags import FlagParser

LAYOUTS = {
    # name: (processes that train, accelerate's configuration)
    "one": (1, None),
    "ddp": (2, "ddp"),
    "fsdp2": (2, "fsdp2"),
    "server": (1, None),
}
SERVER_START_S = 240
LEARNING_RATES = {False: 2**-13, True: 2**-15}  # of LoRA and of FFT, near SmolLM2's best on its task


def main() -> None:
    """Run what was asked for, one after another, and print the table of the folder."""
    parser = FlagParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layouts", nargs="*", choices=list(LAYOUTS), default=[])
    parser.add_argument(
        "--models", nargs="*", default=["smollm2", "1.5b"], help="as --model, or a size of random weights"
    )
    parser.add_argument("--ranks", nargs="*", default=["32", "full"])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--completions", type=int, default=256, help="completions a step")
    parser.add_argument("--completion_length", type=int, help="tokens of the longest; default: the task's, random: 128")
    parser.add_argument("--weak", action="store_true", help="so many completions a step for each training process")
    parser.add_argument("--no_engine", action="store_true", help="generate with transformers instead of vLLM")
    parser.add_argument("--limit", type=float, default=280, help="seconds that a run may take")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        child(options)
        return
    failed = [job for job in jobs(options) if not run_child(job, options)]
    print(layout_table(options.out))
    sys.exit(bool(failed))


def jobs(options: argparse.Namespace) -> list[str]:
    """What to run: `layout:model:rank`."""
    pairs = [(model, rank) for model in options.models for rank in options.ranks]
    return [f"{layout}:{model}:{rank}" for model, rank in pairs for layout in options.layouts]


def file_name(job: str, options: argparse.Namespace) -> str:
    """Of a job's result, without its ending."""
    return f"layout-{job.replace(':', '-').replace('/', '_')}" + "-weak" * options.weak


def run_child(job: str, options: argparse.Namespace) -> bool:
    """One run in a process group of its own; its output goes to a file beside the result."""
    name, model, rank = job.split(":")
    processes, configuration = LAYOUTS[name]
    result = options.out / f"{file_name(job, options)}.json"
    log_path = result.with_suffix(".log")
    result.unlink(missing_ok=True)
    random_model(model, options.out)  # made here once, not by every process of every layout
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
    if processes == 1:
        environment["CUDA_VISIBLE_DEVICES"] = visible[0]
    script = [str(Path(__file__).resolve()), *sys.argv[1:], "--child", job]
    start_with = launcher(processes, configuration, options.out) if configuration else [sys.executable]
    command = [*start_with, *script]
    start = time.perf_counter()
    with open(log_path, "w", encoding="utf-8") as log:
        server = serve(model, rank, visible[-1], options) if name == "server" else nullcontext(None)
        with server as url:
            if url:
                environment["BENCH_SERVER"] = url
            code = wait(command, environment, log, options.limit)
    print(
        f"{job}: {time.perf_counter() - start:.0f} s, {'timed out' if code is None else f'exit code {code}'}",
        flush=True,
    )
    if code != 0 or not result.exists():
        log = log_path.read_text(encoding="utf-8")
        print(log[log.find("Traceback") :][:3000] if "Traceback" in log else log[-2000:], flush=True)
        if name == "server":
            print("the server:", server_log(model, rank, options).read_text(encoding="utf-8")[-2000:], flush=True)
        return False
    return True


def launcher(processes: int, configuration: str, out: Path) -> list[str]:
    """`accelerate launch` with one of the package's configurations."""
    import torch
    import yaml

    from mua_rl.accelerate_configs import config_file

    settings = yaml.safe_load(config_file(configuration).read_text(encoding="utf-8"))
    settings["use_cpu"] = not torch.cuda.is_available()
    path = out / f"{configuration}.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(path)]
    return [*command, "--num_processes", str(processes), "--main_process_port", str(free_port())]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait(command: list[str], environment: dict[str, str], log: Any, limit: float) -> int | None:
    """Run a command to its end or its time limit, and end what it has started; `None`: it ran out of time."""
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        return process.wait(timeout=limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_group(process)


def end_group(process: subprocess.Popen) -> None:
    """End a process and all that it has started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            continue
        time.sleep(1)  # for children to follow


@contextmanager
def serve(model: str, rank: str, device: str, options: argparse.Namespace) -> Iterator[str]:
    """A vLLM server of a model on a GPU of its own, as `mua_rl.grpo` asks for it; it starts while the trainer does."""
    import torch

    from mua_rl.lm import models

    path = str(random_model(model, options.out) or models.model_path(model))
    port = free_port()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path, "--port", str(port)]
    command += ["--host", "127.0.0.1", "--logprobs-mode", "processed_logprobs", "--max-logprobs", "-1"]
    command += ["--max-num-seqs", "256"]
    if torch.cuda.is_available():
        command += ["--dtype", "bfloat16", "--gpu-memory-utilization", "0.8"]
    else:
        command += ["--dtype", "float32", "--enforce-eager"]
    if rank == "full":
        command += ["--weight-transfer-config", '{"backend": "nccl"}']
    else:
        command += ["--enable-lora", "--max-lora-rank", rank]
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": device,
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    with open(server_log(model, rank, options), "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        end_group(process)


def server_log(model: str, rank: str, options: argparse.Namespace) -> Path:
    """What a server prints."""
    return options.out / f"server-{model.replace('/', '_')}-{rank}.log"


def child(options: argparse.Namespace) -> None:
    """In a process of a run: do it, and let the main process write the result."""
    from mua_rl.run import processes

    result = layout_run(*options.child.split(":"), options)
    if processes.is_main():
        path = options.out / f"{file_name(options.child, options)}.json"
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def letters(completions: list, **kwargs: Any) -> list[float]:
    """A reward that random weights get some of: the share of letters among a completion's characters."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(character.isalpha() for character in text) / max(1, len(text)) for text in texts]


def layout_run(layout: str, model: str, rank: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train for some steps in a layout and account for their time, in one of its processes."""
    import torch
    from transformers import TrainerCallback

    from mua_rl.grpo import run as grpo
    from mua_rl.grpo.arguments import parse
    from mua_rl.grpo.setup import prepare_grpo
    from mua_rl.lr.record import package_versions
    from mua_rl.run import processes
    from mua_rl.run.folder import RunFolder
    from mua_rl.run.machine import machine

    number = LAYOUTS[layout][0]
    folder = random_model(model, options.out)
    completions = options.completions * (number if options.weak else 1)
    length = options.completion_length or (128 if folder else None)
    rate = 1e-5 if folder else LEARNING_RATES[rank == "full"]
    flags = ["--model", folder or model, "--rank", rank, "--lr", rate, "--seed", options.seed]
    flags += ["--completions_per_step", completions, "--max_steps", options.steps, "--report_to", "none"]
    flags += ["--held_out_steps", 0, "--save_strategy", "no", "--output_dir", tempfile.mkdtemp(prefix="bench_scale-")]
    flags += ["--max_completion_length", length] if length else []
    if folder:  # its answers never end
        flags += ["--mask_truncated_completions", "false", "--dtype", "bfloat16"]
        flags += ["--per_device_train_batch_size", 32]
    if not options.no_engine:
        flags += ["--use_vllm"]
    if url := os.environ.get("BENCH_SERVER"):
        flags += ["--vllm_mode", "server", "--vllm_server_base_url", url, "--vllm_server_timeout", SERVER_START_S]
    arguments, adapter_arguments, _ = parse([str(flag) for flag in flags])
    setup = prepare_grpo(arguments, adapter_arguments)
    if folder:
        setup = replace(setup, task=replace(setup.task, rewards=(letters,)))
    start = time.perf_counter()
    trainer = grpo.make_trainer(setup, arguments, RunFolder(arguments.requested_output_dir))[0]
    engine_start = time.perf_counter() - start
    phases = Phases()
    instrument(trainer, phases)
    moved: list[int] = []

    class Account(TrainerCallback):
        """Closes a step's account."""

        def on_train_begin(self, args, state, control, optimizer=None, model=None, **kwargs):
            """The first step begins."""
            phases.wrap(optimizer, "step", "optimizer")
            phases.end_step()
            phases.steps.clear()
            moved.append(bytes_of_a_sync(trainer, rank))

        def on_step_end(self, args, state, control, **kwargs):
            """A step ends."""
            phases.end_step()

    trainer.add_callback(Account())
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peaks = processes.gathered([torch.cuda.max_memory_allocated() if cuda else 0])
    history = [line for line in trainer.state.log_history if "loss" in line]
    return {
        "layout": layout,
        "model": model,
        "rank": rank,
        "weak": options.weak,
        "processes": processes.count(),
        "device": machine(),
        "flags": [str(flag) for flag in flags],
        "completions": completions,
        "pass": [arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps],
        "steps": phases.steps,
        "reward": [line["reward"] for line in history],
        "loss": [line["loss"] for line in history],
        "tokens": [line["completions/mean_length"] * completions for line in history],
        "kl": [line["rollout/kl"] for line in history if "rollout/kl" in line],
        "sync_bytes": moved[0],
        "engine_start": engine_start,
        "peak_allocated": peaks,
        "versions": package_versions(),
    }


def bytes_of_a_sync(trainer: Any, rank: str) -> int:
    """What an engine is given at a sync: A and B of a LoRA, else every weight, in the engine's precision."""
    from mua_rl.adapter.targets import lora_layers, lora_matrices
    from mua_rl.rollouts.sync import compute_dtype

    generation = getattr(trainer, "vllm_generation", None)
    if generation is None:
        return 0
    width = 4 if compute_dtype(generation) == "float32" else 2
    if rank == "full":
        return width * sum(p.numel() for p in trainer.model.parameters())
    return width * sum(m.numel() for _, layer in lora_layers(trainer.model) for m in lora_matrices(layer))


def layout_table(out: Path) -> str:
    """Milliseconds a step by phase, speed, reward and memory, one column a run, those of one model side by side."""
    tables, found = [], [json.loads(path.read_text(encoding="utf-8")) for path in out.glob("layout-*.json")]
    runs = sorted(found, key=lambda r: (list(LAYOUTS).index(r["layout"]), r["weak"]))
    for model, rank in sorted({(run["model"], run["rank"]) for run in runs}):
        group = [run for run in runs if (run["model"], run["rank"]) == (model, rank)]
        one = next((run for run in group if run["layout"] == "one"), None)
        rows = [[f"{model} r={rank}", *(run["layout"] + " weak" * run["weak"] for run in group)]]
        kept = [run["steps"][WARM_UP:] or run["steps"] for run in group]
        for phase in PHASES:
            rows.append([f"{phase} ms", *(f"{1000 * mean([s.get(phase, 0.0) for s in steps]):.0f}" for steps in kept)])
        rows.append(["step ms", *(f"{1000 * step_seconds(run):.0f}" for run in group)])
        rows.append(["completions", *(str(run["completions"]) for run in group)])
        rows.append(["tokens/s", *(f"{tokens_per_second(run):.0f}" for run in group)])
        rows.append(["completions/s", *(f"{completions_per_second(run):.0f}" for run in group)])
        # Not tokens, whose number changes as a run learns to be brief.
        times = [completions_per_second(run) / completions_per_second(one) if one else float("nan") for run in group]
        rows.append(["times one", *(f"{t:.2f}" for t in times)])
        gpus = [2 if run["layout"] == "server" else run["processes"] for run in group]
        rows.append(["efficiency", *(f"{t / n:.2f}" for t, n in zip(times, gpus, strict=True))])
        rows.append(["rollout KL", *(f"{mean(run['kl']):.1e}" for run in group)])
        rows.append(["reward, first 5", *(f"{mean(run['reward'][:5]):.3f}" for run in group)])
        rows.append(["reward, last 5", *(f"{mean(run['reward'][-5:]):.3f}" for run in group)])
        rows.append(["MB a sync", *(f"{run['sync_bytes'] / 1e6:.1f}" for run in group)])
        rows.append(["peak GiB", *(f"{max(run['peak_allocated']) / 2**30:.1f}" for run in group)])
        rows.append(["pass", *("×".join(map(str, run["pass"])) for run in group)])
        tables.append(f"\n{group[0]['device']}\n" + columns(rows))
    return "\n".join(tables)


def step_seconds(run: dict[str, Any]) -> float:
    """Mean seconds of a step after the warm-up."""
    return mean([sum(step.values()) for step in (run["steps"][WARM_UP:] or run["steps"])])


def completions_per_second(run: dict[str, Any]) -> float:
    """Completions made and learnt from a second after the warm-up."""
    return run["completions"] / step_seconds(run)


def tokens_per_second(run: dict[str, Any]) -> float:
    """Tokens of completions a second after the warm-up."""
    return mean(run["tokens"][WARM_UP:] or run["tokens"]) / step_seconds(run)


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    main()
