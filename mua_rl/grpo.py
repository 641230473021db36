"""`python -m mua_rl.grpo --rank 32`: GRPO with a verifiable reward, by LoRA at any rank or full finetuning.

Without flags it trains the embedded character-level model on the embedded arithmetic task, which takes a few minutes
on two CPU cores. The learning rate comes from an LR record; see `--lr-from`.
"""

import heapq
import logging
import math
import os
import shutil
import socket
import sys
import time
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    get_scheduler,
)
from transformers.utils import is_liger_kernel_available
from transformers.utils import logging as transformers_logging

from mua_rl import hub, plots, processes
from mua_rl.adapter import Adapter
from mua_rl.arguments import AdapterArguments, Base, resolve_learning_rate
from mua_rl.envs.tasks import Task, get_task, own_code
from mua_rl.errors import Diverged, UserError, exit_on_user_error, one_line
from mua_rl.grpo_arguments import GRPOArguments, parse
from mua_rl.grpo_base import load_base, load_tokenizer
from mua_rl.grpo_report import announce, report
from mua_rl.grpo_trainer import GRPOTrainer, ProgressBar, RunCallback, Start
from mua_rl.heldout import HeldOutResult, gather, held_out, is_conversational, prompt_ids
from mua_rl.policy import LearningRate
from mua_rl.record import LRRecord, package_versions
from mua_rl.rollouts import EngineFailed, generation_class, plan_engine
from mua_rl.rules import Configuration
from mua_rl.run import CURVE, RunFolder, open_run, start_wandb
from mua_rl.statistics import is_clear

Measure = Callable[[], HeldOutResult]
_SHARDING = {"fsdp2": "FSDP2", "zero3": "ZeRO-3"}


def check(arguments: GRPOArguments) -> None:
    """Refuse what would fail later, before anything is written.

    Raises:
        UserError: A package is asked for and is not installed, the hub and there is none, or the launcher leaves most
            processes without weights.
    """
    hub.check(arguments)
    if processes.sharded() and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise UserError(
            "every process needs the weights at the start: set fsdp_cpu_ram_efficient_loading to false in accelerate's "
            "configuration, or take the one that python -m mua_rl.accelerate_configs fsdp2 names."
        )
    if arguments.use_liger_kernel and not is_liger_kernel_available():
        raise UserError(
            "--use_liger_kernel needs Liger's kernels, which are not installed: pip install liger-kernel, or drop the "
            "flag."
        )
    if arguments.use_vllm:
        check_vllm()
        if arguments.vllm_mode == "colocate" and "MASTER_PORT" not in os.environ:
            # TRL would take port 29500 for every run on the machine (trl#3979).
            os.environ["MASTER_PORT"] = str(free_port())


def check_vllm() -> None:
    """Refuse `--use_vllm` where there is no vLLM, and keep it quiet where there is.

    Raises:
        UserError: vLLM is not installed.
    """
    from importlib.util import find_spec

    if find_spec("vllm") is None:
        raise UserError("--use_vllm needs vLLM, which is not installed: pip install 'mua-rl[vllm]', or drop the flag.")
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("vllm").setLevel(logging.WARNING)


def free_port() -> int:
    """A TCP port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Setup:
    """What a run is made of, before anything is written.

    Attributes:
        base: The policy to start from, as the LR policy sees it.
        policy: The model with the adapter attached.
        widths: Fan-ins of the layers that the rules speak of.
        rate: The learning rate and its reason.
        train_rows, held_out_rows: The splits of the task.
    """

    task: Task
    adapter: Adapter
    tokenizer: PreTrainedTokenizerBase
    base: Base
    policy: nn.Module
    configuration: Configuration
    widths: list[int]
    rate: LearningRate
    train_rows: Dataset
    held_out_rows: Dataset


def prepare(arguments: GRPOArguments, adapter_arguments: AdapterArguments) -> Setup:
    """Load the policy, attach the adapter, find the learning rate; fills in what the arguments leave to the task.

    Raises:
        UserError: Something that was given cannot be used.
    """
    check(arguments)
    task = get_task(arguments.task, arguments.bad_rows, arguments.isolation)
    adapter = adapter_arguments.adapter("mlp")
    tokenizer = load_tokenizer(arguments)
    model, base = load_base(arguments, adapter_arguments.start_from)
    rows = splits(task, is_conversational(tokenizer), arguments.held_out_problems)
    check_vocabulary(model, tokenizer, rows)
    configuration = adapter.configuration(model, optimizer=str(getattr(arguments.optim, "value", arguments.optim)))
    rate = resolve_learning_rate(adapter_arguments, configuration, base, "grpo")
    policy = adapter.attach(model, seed=arguments.seed)
    widths = adapter.widths(policy)  # of a LoRA read off its layers; before, PEFT would look for them once more
    arguments.learning_rate = rate.value
    if arguments.max_completion_length is None:
        arguments.max_completion_length = task.max_completion_length
    if arguments.reward_weights is None and task.reward_weights is not None:
        arguments.reward_weights = list(task.reward_weights)
    if arguments.use_vllm:
        longest, is_all = _longest_prompt(tokenizer, rows[0], arguments.template)
        shares = plan_engine(arguments, policy, adapter.rank, longest, is_all)
        if shares is not None and processes.is_main():
            print(f"mua_rl: GPU memory as planned: {shares}")
    return Setup(task, adapter, tokenizer, base, policy, configuration, widths, rate, *rows)


def make_trainer(setup: Setup, arguments: GRPOArguments, run: RunFolder) -> tuple[GRPOTrainer, Measure]:
    """The trainer of a run, and the function that measures its policy on the held-out problems."""

    def measure() -> HeldOutResult:
        assert arguments.max_completion_length is not None
        rows, new_tokens = setup.held_out_rows, arguments.max_completion_length
        own = rows.select(processes.share_of(len(rows)))
        found = held_out(trainer.model, setup.tokenizer, setup.task, own, new_tokens, template=arguments.template)
        return gather(found, len(rows))

    trainer = GRPOTrainer(
        model=setup.policy,
        roles=setup.adapter.learning_rates(setup.rate.value),
        generation=generation_class(setup.adapter.rank, arguments.vllm_sync),
        reward_funcs=setup.task.checked_rewards,
        args=arguments,
        train_dataset=setup.train_rows,
        processing_class=setup.tokenizer,
        callbacks=[RunCallback(run, lambda: measure().metrics(), arguments.held_out_steps)],
    )
    for callback in (ProgressCallback, PrinterCallback):  # either prints a long dictionary every step
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar())
    return trainer, measure


def _set_up_trainer(
    setup: Setup, arguments: GRPOArguments, run: RunFolder, is_new: bool
) -> tuple[GRPOTrainer, Measure]:
    """`make_trainer`; where that fails, a new run's folder is removed: it holds nothing but what was asked.

    Raises:
        UserError: TRL or transformers cannot do what was asked, or the hub or Weights & Biases says no.
    """
    try:
        with hub.reached():
            trainer, measure = make_trainer(setup, arguments, run)
        # These would fail in `train` otherwise, after the first evaluation.
        trainer.get_optimizer_cls_and_kwargs(arguments, cast(PreTrainedModel, setup.policy))
        some_optimizer, options = torch.optim.SGD([torch.zeros(1)]), cast(dict, arguments.lr_scheduler_kwargs)
        get_scheduler(arguments.lr_scheduler_type, some_optimizer, 1, 2, scheduler_specific_kwargs=options)
        if "wandb" in (arguments.report_to or ()) and processes.is_main():
            project = os.environ.get("WANDB_PROJECT", "huggingface")  # as transformers, which would begin a new run
            start_wandb(run, project=project, name=arguments.run_name or run.path.name)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        if is_new and processes.is_main():
            shutil.rmtree(run.path)
        if isinstance(error, (UserError, EngineFailed)):
            raise
        raise UserError(f"GRPO cannot be set up: {one_line(error)}") from error
    return trainer, measure


def train(arguments: GRPOArguments, adapter_arguments: AdapterArguments, given: dict) -> RunFolder:
    """One run from arguments to record.

    Args:
        arguments, adapter_arguments: What to do.
        given: The settings that the run folder keeps, as `parse` returns them.

    Raises:
        UserError: Something that was given cannot be used (nothing has been written then), a reward failed, none gave a
            score in the whole run, or the hub does not take what the run has written.
        Diverged: The run left the finite numbers; its folder says so and has no LR record.
    """
    if adapter_arguments.resume:
        checkpoint = RunFolder.open(adapter_arguments.resume).last_checkpoint()
        _check_layout(checkpoint)
        _check_whole(checkpoint)
        if checkpoint and arguments.save_only_model:
            raise UserError(
                f"{checkpoint} holds weights and no optimizer (--save_only_model), so that a run cannot go on from it: "
                "start anew, without the flag."
            )
    setup = prepare(arguments, adapter_arguments)
    name = f"grpo-{arguments.task}-r{setup.adapter.rank or 'full'}"
    if arguments.batch_is_given:
        given = {**given, "completions_per_step": arguments.completions_per_step}
    run, checkpoint = processes.on_main(
        lambda: open_run(adapter_arguments.resume, arguments.requested_output_dir, name, given, setup.rate.as_dict())
    )
    arguments.output_dir = str(run.path)
    if processes.is_main():
        announce(run, setup.task.name, setup.base.name, setup.policy, setup.configuration, setup.rate)
    trainer, measure = _set_up_trainer(setup, arguments, run, is_new=adapter_arguments.resume is None)
    start = Start(lambda: _before(run, measure))
    trainer.add_callback(start)
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Diverged as error:
        rate = setup.rate.value
        if processes.is_main():
            run.finish(
                {"diverged": True, "reason": str(error), "held_out/before": start.accuracy, "learning_rate": rate}
            )
        raise
    finally:
        cast(ProgressBar, trainer.pop_callback(ProgressBar)).close()
    seconds = time.perf_counter() - start.time
    after = measure()
    trainer.save_model(str(run.path / setup.adapter.saved_as), _internal_call=True)  # as yet without a push
    if processes.is_main():
        close(run, setup, arguments, start, after, seconds, trainer.state.global_step)
    if arguments.push_to_hub:
        hub.push(trainer, run.path)
    return run


def close(
    run: RunFolder,
    setup: Setup,
    arguments: GRPOArguments,
    start: Start,
    after: HeldOutResult,
    seconds: float,
    steps: int,
) -> None:
    """Write and show what a run that has ended came to; a record only where it has not got worse.

    Raises:
        UserError: No reward gave a score in the whole run.
    """
    before = start.accuracy
    run.log(steps, after.metrics())
    scored = is_scored([line["reward"] for line in run.metrics() if "reward" in line])
    worse = is_clear(before - after.accuracy, after.standard_error)
    result = {
        "diverged": worse or not scored,
        "held_out/before": before,
        "held_out/after": after.accuracy,
        "held_out/standard_error": after.standard_error,
        "held_out/problems": len(after.scores),
        "learning_rate": setup.rate.value,
        "reason": setup.rate.reason,
        "seconds": seconds,
        "seconds_per_step": seconds / max(1, steps - start.step),
        "steps": steps,
    }
    if not scored:
        run.finish(result)
        raise unscored(setup.task, steps)
    plots.learning_curve(
        run.metrics(),
        run.path / CURVE,
        f"{setup.task.name}, {setup.configuration}, lr {setup.rate.value:.3g}",
        {"reward": "training reward", "held_out/accuracy": "held-out accuracy"},
        "optimizer step",
    )
    if not worse:
        metric = {"name": "held-out accuracy", "before": before, "after": after.accuracy}
        lr_record(arguments, setup, metric, steps).save(run.path)
    run.finish(result)
    report(run, setup.rate)


def is_scored(rewards: Sequence[float | None]) -> bool:
    """Whether the mean rewards of a run's steps have a number among them; true of no steps."""
    return not rewards or any(reward is not None and not math.isnan(reward) for reward in rewards)


def unscored(task: Task, steps: int) -> UserError:
    """What to say of a run in which no completion had a score."""
    names = ", ".join(getattr(reward, "__name__", "a reward without a name") for reward in task.rewards)
    return UserError(
        f"no completion had a score in any of {steps} steps, so nothing was learnt, and there is no LR record: see why "
        f"the rewards of the task {task.name} ({names}) give None; --log_completions shows what they were given."
    )


def lr_record(arguments: GRPOArguments, setup: Setup, metric: dict, steps: int) -> LRRecord:
    """The LR record of a run that has ended well, after so many optimizer steps."""
    assert arguments.generation_batch_size and arguments.num_generations
    return LRRecord(
        learning_rate=setup.rate.value,
        scheme=setup.configuration.scheme.value,
        rank=setup.configuration.rank,
        alpha=str(setup.configuration.alpha),
        widths=setup.widths,
        target_modules=setup.adapter.target_modules,
        algorithm="grpo",
        task=arguments.task,
        base_model=setup.base.name,
        base_fingerprint=setup.base.fingerprint,
        optimizer={
            "name": setup.configuration.optimizer,
            "betas": [arguments.adam_beta1, arguments.adam_beta2],
            "eps": arguments.adam_epsilon,
            "weight_decay": arguments.weight_decay,
            "max_grad_norm": arguments.max_grad_norm,
        },
        schedule={
            "name": str(getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type)),
            "options": arguments.lr_scheduler_kwargs or {},
            "warmup": arguments.warmup_steps,
            "steps": steps,
        },
        batch={
            "prompts": arguments.generation_batch_size // arguments.num_generations,
            "completions_per_prompt": arguments.num_generations,
            "optimizer_steps_per_batch": arguments.optimizer_steps_per_batch,
        },
        metric=metric,
        seeds=[arguments.seed],
        versions=package_versions(),
        outputs=setup.configuration.outputs,
        note=setup.rate.reason,
    )


def splits(task: Task, conversational: bool, held_out_problems: int | None) -> tuple[Dataset, Dataset]:
    """The two splits of a task, the held-out one cut to its first rows where that is asked for."""
    with own_code(f"the task {task.name}"):
        train_rows, held_out_rows = task.train(conversational), task.held_out(conversational)
    for split, rows in (("train", train_rows), ("held-out", held_out_rows)):
        if not isinstance(rows, Dataset):
            raise UserError(f"the {split} split of the task {task.name} is a {type(rows).__name__}, not a Dataset.")
        if "prompt" not in rows.column_names or len(rows) == 0:
            raise UserError(f"the {split} split of the task {task.name} has no rows with a column 'prompt'.")
    if held_out_problems is not None:
        held_out_rows = held_out_rows.select(range(min(held_out_problems, len(held_out_rows))))
    return train_rows, held_out_rows


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows_of_splits: Sequence[Dataset]
) -> None:
    """Refuse a tokenizer that writes the task in tokens for which the model has no embedding.

    Tokens that no prompt needs may lack one: Gemma 3's text models have a tokenizer with a token for images.

    Raises:
        UserError: It does.
    """
    embeddings = len(cast(torch.Tensor, model.get_input_embeddings().weight))
    if max(tokenizer.get_vocab().values()) < embeddings:
        return
    prompts = [ids for rows in rows_of_splits for ids in prompt_ids(tokenizer, rows["prompt"])]
    last = max(tokenizer.eos_token_id, tokenizer.pad_token_id, *map(max, filter(None, prompts)))
    if last >= embeddings:
        raise UserError(
            f"the tokenizer has {len(tokenizer)} tokens, the model embeddings for {embeddings}, and "
            f"{tokenizer.convert_ids_to_tokens(last)!r} has none: give the model its own tokenizer, or embeddings for "
            "all tokens (model.resize_token_embeddings)."
        )


def _longest_prompt(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, template: dict, most: int = 20_000
) -> tuple[int, bool]:
    """Tokens of the longest prompt, and whether all were counted: of more rows than `most`, those of most text are."""
    prompts, is_all = rows["prompt"], len(rows) <= most
    if not is_all:
        prompts = heapq.nlargest(most, prompts, key=lambda prompt: len(str(prompt)))
    return max(map(len, prompt_ids(tokenizer, prompts, **template))), is_all


def _check_layout(checkpoint: Path | None) -> None:
    """Refuse a checkpoint of another kind: what FSDP2 writes is for FSDP2, what ZeRO-3 writes for as many processes.

    Raises:
        UserError: It is.
    """
    marks = {"pytorch_model_fsdp.bin": "fsdp2", "latest": "zero3", "optimizer.pt": None}
    found = [way for mark, way in marks.items() if checkpoint is not None and (checkpoint / mark).exists()]
    if not found:
        return
    assert checkpoint is not None
    (written, *_), now = found, processes.sharding()
    shares = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))  # one of each process, by DeepSpeed
    if written == now and (now != "zero3" or shares == processes.launched()):
        return
    if written is None:
        assert now is not None
        name = _SHARDING[now]
        raise UserError(f"{checkpoint} was written without {name}: resume without it, on any number of processes.")
    number = f"--num_processes {shares}" if written == "zero3" else "any number of processes, also 1"
    raise UserError(
        f"{checkpoint} was written under {_SHARDING[written]}: resume with accelerate launch --config_file $(python -m "
        f"mua_rl.accelerate_configs {written}) and {number}."
    )


def _check_whole(checkpoint: Path | None) -> None:
    """Refuse a checkpoint with a damaged file, which transformers would stumble over.

    Raises:
        UserError: It has one.
    """
    files = sorted(checkpoint.iterdir()) if checkpoint else []
    for path in files:
        whole = path.suffix not in (".pt", ".pth") or zipfile.is_zipfile(path)  # torch.save writes zip archives
        if path.suffix == ".safetensors":
            try:
                safe_open(path, "pt")
            except (OSError, SafetensorError):
                whole = False
        if not whole:
            raise UserError(f"{path} is damaged: delete {checkpoint}, and --resume goes on from the one before.")


def _before(run: RunFolder, measure: Measure) -> float:
    """Held-out accuracy before the first step; measured once, also where a run is resumed."""

    def known() -> list[float]:
        return [m["held_out/accuracy"] for m in run.metrics() if m["step"] == 0 and "held_out/accuracy" in m]

    if earlier := processes.on_main(known):
        return earlier[0]
    result = measure()
    if processes.is_main():
        run.log(0, result.metrics())
    return result.accuracy


def main() -> None:
    """The command line."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    arguments, adapter_arguments, given = parse()
    try:
        train(arguments, adapter_arguments, given)
    except EngineFailed as error:
        print(f"mua_rl: {error}; go on with --resume and the run folder.", file=sys.stderr)
        sys.exit(4)
    except KeyboardInterrupt:
        print("mua_rl: interrupted; go on with --resume and the run folder.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    exit_on_user_error(main)
