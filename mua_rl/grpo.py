"""`python -m mua_rl.grpo --rank 32`: GRPO with a verifiable reward, by LoRA at any rank or full finetuning.

Without flags it trains the embedded character-level model on the embedded arithmetic task, which takes a few minutes
on two CPU cores. The learning rate comes from an LR record; see `--lr-from`.
"""

import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging
from trl import GRPOConfig

from mua_rl import models, plots
from mua_rl.adapter import Adapter, fingerprint, load_adapter
from mua_rl.arguments import AdapterArguments, Base, parse_arguments, resolve_learning_rate
from mua_rl.envs.tasks import Task, get_task
from mua_rl.errors import UserError, exit_on_user_error
from mua_rl.grpo_trainer import Diverged, GRPOTrainer, ProgressBar, RunCallback
from mua_rl.heldout import HeldOutResult, held_out, is_conversational
from mua_rl.policy import LearningRate
from mua_rl.record import LRRecord, package_versions
from mua_rl.rules import Configuration
from mua_rl.run import ADAPTER_FOLDER, CONFIG, CURVE, MODEL_FOLDER, RunFolder


@dataclass
class GRPOArguments(GRPOConfig):
    """TRL's `GRPOConfig` with the defaults of the paper's RLVR recipe; every field is a flag and a YAML key.

    These defaults differ from TRL's: AdamW without weight decay, 5 % warm-up, cosine decay to a tenth of the peak,
    truncated completions masked, 32 prompts × 8 completions a step, no gradient checkpointing, and bf16 only where
    there is a GPU for it. DAPO loss, β = 0, clipping at 1 and temperature 1 are TRL's own.
    """

    model: str = field(default=models.EMBEDDED, metadata={"help": "embedded, smollm2, a model folder, or a hub id."})
    task: str = field(default="arithmetic", metadata={"help": "A verifiable task; see mua_rl.envs.tasks."})
    bad_rows: str = field(
        default="skip",
        metadata={"help": "Rows that cannot be scored: skip and report, or refuse.", "choices": ["skip", "refuse"]},
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the weights that LoRA leaves frozen.", "choices": ["float32", "bfloat16"]},
    )
    held_out_steps: int = field(
        default=25, metadata={"help": "Measure held-out accuracy every so many steps; 0: only before and after."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Run folder. Default: a new one under runs/."})
    learning_rate: float | None = field(default=None, metadata={"help": "The same as --lr."})  # type: ignore[assignment]
    max_steps: int = field(default=200, metadata={"help": "Optimizer steps; -1: as many as num_train_epochs makes."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Completions per forward pass."})
    gradient_accumulation_steps: int = field(default=4, metadata={"help": "Forward passes per optimizer step."})
    max_completion_length: int | None = field(default=None, metadata={"help": "In tokens. Default: the task's."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 the fraction of all steps."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Name of the LR schedule."})
    lr_scheduler_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of the schedule. Default of the cosine: a minimum of a tenth."}
    )
    mask_truncated_completions: bool = field(
        default=True, metadata={"help": "Leave completions that hit the length limit out of the loss."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade compute for memory."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    save_steps: float = field(default=50, metadata={"help": "Checkpoint every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    report_to: None | str | list[str] = field(  # noqa: RUF036  # the order in which the parser takes a list
        default="tensorboard", metadata={"help": "tensorboard, wandb, trackio, none, or several."}
    )

    def __post_init__(self) -> None:
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.requested_output_dir = self.output_dir  # the next line fills in a default
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        super().__post_init__()


def load_base(arguments: GRPOArguments, start_from: str | None) -> tuple[PreTrainedModel, Base]:
    """The model to start from: `--model`, or what the run `--start-from` ended with, its LoRA merged.

    Raises:
        UserError: A model or a run that cannot be used.
    """
    if start_from is None:
        model = models.load_model(arguments.model, arguments.dtype, **(cast(dict, arguments.model_init_kwargs) or {}))
        return model, Base(arguments.model, fingerprint(model))
    run = RunFolder.open(start_from)
    record = LRRecord.load(run.path)
    settings = run.settings()
    if (run.path / MODEL_FOLDER).is_dir():
        model = models.load_model(str(run.path / MODEL_FOLDER))
    else:
        earlier, _ = load_base(
            GRPOArguments(model=settings.get("model", models.EMBEDDED), report_to="none"), settings.get("start_from")
        )
        model = load_adapter(earlier, run.path / ADAPTER_FOLDER).merge_and_unload()
    return model, Base(f"{record.base_model} after {start_from}", fingerprint(model), record)


def lr_record(
    arguments: GRPOArguments,
    adapter: Adapter,
    rate: LearningRate,
    configuration: Configuration,
    base: Base,
    widths: list[int],
    metric: dict,
) -> LRRecord:
    """The record of a run that has ended."""
    assert arguments.generation_batch_size and arguments.num_generations and arguments.steps_per_generation
    return LRRecord(
        learning_rate=rate.value,
        scheme=configuration.scheme.value,
        rank=configuration.rank,
        alpha=str(configuration.alpha),
        widths=widths,
        target_modules=adapter.target_modules,
        algorithm="grpo",
        task=arguments.task,
        base_model=base.name,
        base_fingerprint=base.fingerprint,
        optimizer={
            "name": configuration.optimizer,
            "betas": [arguments.adam_beta1, arguments.adam_beta2],
            "eps": arguments.adam_epsilon,
            "weight_decay": arguments.weight_decay,
            "max_grad_norm": arguments.max_grad_norm,
        },
        schedule={
            "name": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
            "options": arguments.lr_scheduler_kwargs or {},
            "warmup": arguments.warmup_steps,
            "steps": arguments.max_steps,
        },
        batch={
            "prompts": arguments.generation_batch_size // arguments.num_generations,
            "completions_per_prompt": arguments.num_generations,
            "optimizer_steps_per_batch": arguments.steps_per_generation
            // arguments.gradient_accumulation_steps
            * arguments.num_iterations,
        },
        metric=metric,
        seeds=[arguments.seed],
        versions=package_versions(),
        note=rate.reason,
    )


def check(arguments: GRPOArguments) -> None:
    """Refuse what would fail later, before anything is written.

    Raises:
        UserError: vLLM is asked for and is not installed.
    """
    if arguments.use_vllm:
        from importlib.util import find_spec

        if find_spec("vllm") is None:
            raise UserError(
                "--use_vllm needs vLLM, which is not installed: pip install 'mua-rl[vllm]', or drop the flag."
            )
        if arguments.vllm_mode == "colocate" and "MASTER_PORT" not in os.environ:
            # TRL would take port 29500 for every run on the machine (trl#3979).
            os.environ["MASTER_PORT"] = str(_free_port())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(arguments: GRPOArguments, adapter_arguments: AdapterArguments, given: dict) -> RunFolder:
    """One run from arguments to result: build, attach, optimize, train, evaluate, record.

    Raises:
        UserError: Something that was given cannot be used; nothing has been written then.
        Diverged: The run left the finite numbers; its folder says so and has no LR record.
    """
    check(arguments)
    task: Task = get_task(arguments.task, arguments.bad_rows)
    adapter = adapter_arguments.adapter("mlp")
    tokenizer = models.load_tokenizer(arguments.model)
    model, base = load_base(arguments, adapter_arguments.start_from)
    configuration = adapter.configuration(model, optimizer=str(getattr(arguments.optim, "value", arguments.optim)))
    widths = adapter.widths(model)
    rate = resolve_learning_rate(adapter_arguments, configuration, base, "grpo")
    arguments.learning_rate = rate.value
    policy = adapter.attach(model, seed=arguments.seed)
    conversational = is_conversational(tokenizer)
    train_rows, held_out_rows = task.train(conversational), task.held_out(conversational)
    if "prompt" not in train_rows.column_names:
        raise UserError(f"the task {task.name} has rows without the column 'prompt'.")
    if arguments.max_completion_length is None:
        arguments.max_completion_length = task.max_completion_length
    if arguments.reward_weights is None and task.reward_weights is not None:
        arguments.reward_weights = list(task.reward_weights)

    run, checkpoint = _open_run(arguments, adapter_arguments, adapter, given)
    arguments.output_dir = str(run.path)
    console = Console(stderr=False)
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    console.print(
        f"[bold]{arguments.task}[/] with {base.name} ({model.num_parameters():,} weights), {configuration}, "
        f"{trained:,} trained\nlearning rate [bold]{rate.value:.4g}[/]: {rate.reason}\nrun folder {run.path}",
        highlight=False,
    )

    def measure() -> HeldOutResult:
        assert arguments.max_completion_length is not None
        return held_out(trainer.model, tokenizer, task, held_out_rows, arguments.max_completion_length)

    trainer = GRPOTrainer(
        model=policy,
        roles=adapter.learning_rates(rate.value),
        reward_funcs=list(task.rewards),
        args=arguments,
        train_dataset=train_rows,
        processing_class=tokenizer,
        callbacks=[RunCallback(run, lambda: measure().metrics(), arguments.held_out_steps)],
    )
    for callback in (ProgressCallback, PrinterCallback):  # either prints a long dictionary every step
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar())
    before = _before(run, measure)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Diverged as error:
        run.finish({"diverged": True, "reason": str(error), "held_out/before": before, "learning_rate": rate.value})
        raise
    seconds = time.perf_counter() - start
    after = measure()
    trainer.save_model(str(run.path / adapter.saved_as))
    run.log(trainer.state.global_step, after.metrics())
    worse = after.accuracy + 2 * after.standard_error < before
    run.finish(
        {
            "diverged": worse,
            "held_out/before": before,
            "held_out/after": after.accuracy,
            "held_out/standard_error": after.standard_error,
            "held_out/problems": len(after.scores),
            "learning_rate": rate.value,
            "reason": rate.reason,
            "seconds": seconds,
            "steps": trainer.state.global_step,
        }
    )
    metrics = run.metrics()
    plots.learning_curve(
        metrics,
        run.path / CURVE,
        f"{task.name}, {configuration}, lr {rate.value:.3g}",
        {"reward": "training reward", "held_out/accuracy": "held-out accuracy"},
        "optimizer step",
    )
    if not worse:
        metric = {"name": "held-out accuracy", "before": before, "after": after.accuracy}
        lr_record(arguments, adapter, rate, configuration, base, widths, metric).save(run.path)
    _report(console, run, before, after, metrics, rate, seconds, worse)
    return run


def _open_run(
    arguments: GRPOArguments, adapter_arguments: AdapterArguments, adapter: Adapter, given: dict
) -> tuple[RunFolder, Path | None]:
    """A new run folder, or the one to resume with its last checkpoint."""
    if adapter_arguments.resume is None:
        rank = adapter.rank or "full"
        run = RunFolder.create(
            arguments.requested_output_dir, re.sub(r"[^\w.-]+", "-", f"grpo-{arguments.task}-r{rank}")
        )
        run.start({**given, "output_dir": str(run.path)})
        return run, None
    run = RunFolder.open(adapter_arguments.resume)
    checkpoint = run.last_checkpoint()
    run.rewind(int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0)
    print(f"resuming {run.path} from {checkpoint.name if checkpoint else 'the start: it has no checkpoint yet'}")
    return run, checkpoint


def _before(run: RunFolder, measure: Callable[[], HeldOutResult]) -> float:
    """Held-out accuracy before the first step; measured once, also where a run is resumed."""
    known = [line["held_out/accuracy"] for line in run.metrics() if line["step"] == 0 and "held_out/accuracy" in line]
    if known:
        return known[0]
    result = measure()
    run.log(0, result.metrics())
    return result.accuracy


def _report(
    console: Console,
    run: RunFolder,
    before: float,
    after: HeldOutResult,
    metrics: list[dict],
    rate: LearningRate,
    seconds: float,
    worse: bool,
) -> None:
    """The closing table and what to do next."""
    rewards = [line["reward"] for line in metrics if "reward" in line]
    tenth = max(1, len(rewards) // 10)
    rows = Table(show_header=False, title="result", title_justify="left")
    rows.add_row("held-out accuracy before", f"{before:.3f}")
    rows.add_row("held-out accuracy after", f"{after.accuracy:.3f} ± {after.standard_error:.3f}", style="bold")
    rows.add_row("training reward, first tenth → last", f"{_mean(rewards[:tenth]):.3f} → {_mean(rewards[-tenth:]):.3f}")
    rows.add_row("learning rate", f"{rate.value:.4g}")
    rows.add_row("training time", f"{seconds:.0f} s, {seconds / max(1, len(rewards)):.2f} s a step")
    rows.add_row("run folder", str(run.path))
    console.print(rows)
    if worse:
        console.print(
            "[bold red]The policy got worse[/]: this learning rate is too large, and no LR record was written. "
            "Try a quarter of it with --lr."
        )
        return
    console.print(
        f"learning curve: {run.path / CURVE}\n"
        f"the learning rate at other ranks: python -m mua_rl.lr {run.path}\n"
        f"full finetuning at this rate: python -m mua_rl.grpo --rank full --lr-from {run.path}\n"
        f"… from this policy: python -m mua_rl.grpo --start-from {run.path}",
        highlight=False,
        soft_wrap=True,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def parse(argv: list[str] | None = None) -> tuple[GRPOArguments, AdapterArguments, dict]:
    """Command line to arguments; `--resume RUN` brings back the settings of that run.

    Raises:
        UserError: As `parse_arguments`; or a run that cannot be resumed.
    """
    (arguments, adapter_arguments), given = parse_arguments((GRPOArguments, AdapterArguments), argv)
    if adapter_arguments.resume:
        run = RunFolder.open(adapter_arguments.resume)
        if extra := sorted(given.keys() - {"resume"}):
            raise UserError(f"--resume takes the run's own settings: drop {', '.join(extra)}.")
        if run.result() is not None:
            raise UserError(f"the run {run.path} has ended: go on from its policy with --start-from {run.path}.")
        resume = adapter_arguments.resume
        (arguments, adapter_arguments), given = parse_arguments(
            (GRPOArguments, AdapterArguments), ["--config", str(run.path / CONFIG)]
        )
        adapter_arguments.resume = resume
    if arguments.learning_rate is not None:
        if adapter_arguments.lr not in (None, arguments.learning_rate):
            raise UserError("--lr and --learning_rate differ: they are the same thing, give one of them.")
        adapter_arguments.lr = arguments.learning_rate
    if "num_train_epochs" in given and "max_steps" not in given:
        arguments.max_steps = -1
    return arguments, adapter_arguments, given


def main() -> None:
    """The command line."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    arguments, adapter_arguments, given = parse()
    try:
        train(arguments, adapter_arguments, given)
    except Diverged as error:
        print(f"mua_rl: the run diverged: {error}; try a quarter of the learning rate with --lr.", file=sys.stderr)
        sys.exit(3)


if __name__ == "__main__":
    exit_on_user_error(main)
