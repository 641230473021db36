"""Evaluate a checkpoint on the held-out problems of a task: pass@1 and pass@k with 95% intervals.

    python scripts/evaluate.py --model smollm2 --task one-liners --samples 16 --temperature 0.8
    python scripts/evaluate.py --model Qwen/Qwen2.5-1.5B-Instruct --adapter runs/…/adapter --task gsm8k --engine vllm

An interrupted evaluation goes on when the same command is given again.
"""

import argparse
import re
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mua_rl.envs.tasks import get_task
from mua_rl.evaluation.engines import Engine, TransformersEngine, VLLMEngine
from mua_rl.evaluation.evaluation import Evaluation, Settings, default_ks, evaluate
from mua_rl.exits import run_command
from mua_rl.flags import FlagParser


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, hub id, or an alias of python -m mua_rl.grpo")
    parser.add_argument("--adapter", help="folder of a LoRA adapter to put on the model")
    parser.add_argument("--task", required=True, help="task spec, see mua_rl.envs.tasks")
    parser.add_argument("--samples", type=int, default=1, help="answers per problem (default 1)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): greedy")
    parser.add_argument("--max_tokens", type=int, help="most tokens of an answer; default: the task's")
    parser.add_argument("--engine", choices=["transformers", "vllm"], default="transformers")
    parser.add_argument("--limit", type=int, help="only the first so many problems")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=64, help="answers at once (transformers)")
    parser.add_argument("--bad_rows", choices=["skip", "refuse"], default="skip", help="rows that cannot be scored")
    parser.add_argument(
        "--isolation", choices=["strong", "process"], default="strong", help="of programs, in code tasks"
    )
    parser.add_argument("--output", type=Path, help="folder; default evaluations/MODEL-TASK")
    return parser.parse_args()


def summary_table(evaluation: Evaluation) -> Table:
    """The figures of an evaluation."""
    settings = evaluation.settings
    title = f"{settings['task']}: {settings['model']}" + (f" + {settings['adapter']}" if settings["adapter"] else "")
    table = Table("", "share [95% interval]", title=title)
    for k in default_ks(settings["samples"]):
        table.add_row(f"pass@{k}", str(evaluation.pass_at(k)))
    strict = evaluation.strict()
    if strict is not None:
        table.add_row("pass@1, strict form only", str(strict))
    table.caption = (
        f"{len(evaluation.problems)} problems, {settings['samples']} answers each, "
        f"temperature {settings['temperature']}, {settings['engine']}"
    )
    return table


def main() -> None:
    """Evaluate and print."""
    arguments = parse_arguments()
    task = get_task(arguments.task, arguments.bad_rows, arguments.isolation)
    settings = Settings(
        model=arguments.model,
        adapter=arguments.adapter,
        task=arguments.task,
        samples=arguments.samples,
        temperature=arguments.temperature,
        max_tokens=arguments.max_tokens or task.max_completion_length,
        engine=arguments.engine,
        seed=arguments.seed,
        limit=arguments.limit,
    )
    common = (settings.model, settings.adapter, settings.max_tokens, settings.temperature)
    engine: Engine
    engine = VLLMEngine(*common) if settings.engine == "vllm" else TransformersEngine(*common, arguments.batch_size)
    name = "-".join(part for part in (settings.model, settings.adapter, settings.task) if part)
    folder = arguments.output or Path("evaluations") / re.sub(r"[^\w.=,+-]+", "-", name).strip("-.")
    evaluation = evaluate(task, engine, settings, folder)
    console = Console()
    console.print(summary_table(evaluation))
    console.print(f"answers and scores: {folder}/problems.jsonl", highlight=False)


if __name__ == "__main__":
    run_command(main)
