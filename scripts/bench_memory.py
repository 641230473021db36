"""The memory that is planned for a training process against what it takes at its peak, on one GPU.

Training steps without an engine on random weights, each policy in a process of its own, one after another; the table is
of all results in the folder:

    python scripts/bench_memory.py 135m 1.5b 8b --out DIR

In miniature on a CPU, which counts no bytes:

    python scripts/bench_memory.py tiny --out DIR
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_grpo import columns
from random_llama import random_llama

from mua_rl.lr.spec import AdapterSpec

MEMORY = {
    # size: (ranks, completions of a pass, tokens of one)
    "tiny": (["32", "full"], 8, 64),
    "135m": (["32", "full"], 64, 256),
    "1.5b": (["32", "full"], 16, 512),
    "8b": (["32"], 4, 512),
}


def main() -> None:
    """Measure what was asked for and print the table of the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", choices=list(MEMORY), metavar="SIZE", help=", ".join(MEMORY))
    parser.add_argument("--ranks", nargs="*", default=["32", "full"])
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--limit", type=float, default=280, help="seconds that one may take")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.child:
        result = memory_run(*options.child, options)
        (options.out / f"memory-{'-'.join(options.child)}.json").write_text(
            json.dumps(result, indent=2) + "\n", encoding="utf-8"
        )
        return
    jobs = [(size, rank) for size in options.sizes for rank in MEMORY[size][0] if rank in options.ranks]
    failed = [job for job in jobs if not run_child(*job, options)]
    print(memory_table(options.out))
    sys.exit(bool(failed))


def run_child(size: str, rank: str, options: argparse.Namespace) -> bool:
    """One measurement in a process of its own; its output goes to a file beside the result."""
    command = [sys.executable, str(Path(__file__).resolve()), *sys.argv[1:], "--child", size, rank]
    log_path = options.out / f"memory-{size}-{rank}.log"
    with open(log_path, "w", encoding="utf-8") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, timeout=options.limit).returncode
        except subprocess.TimeoutExpired:
            code = None
    print(f"{size} r={rank}: {'timed out' if code is None else f'exit code {code}'}", flush=True)
    if code:
        print(log_path.read_text(encoding="utf-8")[-2000:], flush=True)
    return code == 0


def memory_run(size: str, rank: str, options: argparse.Namespace) -> dict[str, Any]:
    """Some steps of the trainer alone, on completions that are made up, and the plan of the same."""
    import torch

    from mua_rl.adapter.adapters import adapter_for
    from mua_rl.envs.tasks import get_task
    from mua_rl.grpo.arguments import parse
    from mua_rl.grpo.trainer import GRPOTrainer
    from mua_rl.lm import models
    from mua_rl.lr.rank import parse_rank
    from mua_rl.lr.record import package_versions
    from mua_rl.rollouts.memory import PolicySize, trainer_memory
    from mua_rl.run.machine import machine

    cuda = torch.cuda.is_available()
    _, micro, length = MEMORY[size]
    full = rank == "full"
    adapter = adapter_for(AdapterSpec.parse(parse_rank(rank)), "mlp")
    flags = ["--per_device_train_batch_size", micro, "--gradient_accumulation_steps", 2, "--max_steps", 3]
    flags += ["--max_completion_length", length, "--report_to", "none", "--lr", 1e-5, "--save_strategy", "no"]
    flags += ["--num_generations", 2, "--gradient_checkpointing", options.checkpointing]
    flags += ["--output_dir", tempfile.mkdtemp(prefix="bench_memory-")]
    arguments, _, _ = parse([str(flag) for flag in flags])
    arguments.learning_rate, arguments.output_dir = 1e-5, arguments.requested_output_dir
    policy = adapter.attach(random_llama(size, torch.float32 if full or not cuda else torch.bfloat16))
    tokenizer = models.load_tokenizer(models.EMBEDDED)
    draw = random.Random(options.seed)

    def made_up(prompts: list, trainer: Any) -> dict[str, Any]:
        rows = [[draw.randrange(3, 100) for _ in range(length)] for _ in prompts]
        ids = tokenizer(list(prompts))["input_ids"]
        return {"prompt_ids": ids, "completion_ids": rows, "logprobs": None}

    rows = get_task("arithmetic").train(False)
    trainer = GRPOTrainer(
        model=policy,
        roles=adapter.learning_rates(1e-5),
        reward_funcs=[lambda completions, **kwargs: [draw.random() for _ in completions]],
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        rollout_func=made_up,
    )
    arguments.mask_truncated_completions = trainer.mask_truncated_completions = False
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    tokens = length + max(len(tokenizer(row)["input_ids"]) for row in rows["prompt"][:64])
    planned = trainer_memory(
        PolicySize.of(policy),
        micro_batch=micro,
        length=tokens,
        compute_bytes=2 if arguments.bf16 else 4,
        checkpointing=arguments.gradient_checkpointing,
    )
    return {
        "size": size,
        "rank": rank,
        "pass": [micro, tokens],
        "checkpointing": bool(arguments.gradient_checkpointing),
        "peak": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
        "plan": planned.parts(),
        "loss": [line["loss"] for line in trainer.state.log_history if "loss" in line],
        "device": machine(),
        "versions": package_versions(),
    }


def memory_table(out: Path) -> str:
    """The peak beside the plan."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(out.glob("memory-*.json"))]
    if not found:
        return ""
    parts = list(found[0]["plan"])
    rows = [["model", "rank", "pass", *parts, "plan GiB", "peak GiB", "plan / peak", "reserved"]]
    for r in found:
        plan = sum(r["plan"].values())
        share = f"{plan / r['peak']:.2f}" if r["peak"] else "-"
        gib = [f"{size / 2**30:.2f}" for size in (*r["plan"].values(), plan, r["peak"])]
        checked = r["size"] + " (checkpointing)" * r["checkpointing"]
        rows.append([checked, r["rank"], "×".join(map(str, r["pass"])), *gib, share, f"{r['reserved'] / 2**30:.2f}"])
    return f"\n{found[0]['device']}\n" + columns(rows)


if __name__ == "__main__":
    main()
