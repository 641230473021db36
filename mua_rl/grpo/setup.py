"""What a GRPO run is made of, loaded and checked before anything is written."""

import heapq
import importlib.util
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations import INTEGRATION_TO_CALLBACK, get_available_reporting_integrations
from transformers.utils import is_liger_kernel_available

from mua_rl.adapter.adapters import Adapter
from mua_rl.envs.tasks import Task, get_task, load_split
from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.base import load_base, load_tokenizer
from mua_rl.lm import models
from mua_rl.lm.text import check_template, is_conversational, prompt_ids
from mua_rl.lr.rules import Configuration
from mua_rl.lr.transfer import LearningRate
from mua_rl.rollouts.planning import plan_engine
from mua_rl.rollouts.sync import ADAPTER
from mua_rl.run import hub, processes
from mua_rl.run.arguments import AdapterArguments
from mua_rl.run.learning_rate import Base, resolve_learning_rate


def _check(arguments: GRPOArguments) -> None:
    """Refuse what would fail later, before anything is written, and give a colocated engine a port of its own.

    Raises:
        UserError: A package is not installed, the hub is out of reach, or the launcher leaves most processes without
            weights.
    """
    hub.check(arguments)
    if processes.sharded() and os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        raise UserError(
            "every process needs the weights at the start: set fsdp_cpu_ram_efficient_loading to false in accelerate's "
            "configuration, or take the one that python -m mua_rl.accelerate_configs fsdp2 names."
        )
    for name in arguments.report_to or ():
        if name in INTEGRATION_TO_CALLBACK and name not in get_available_reporting_integrations():
            raise UserError(f"--report_to {name} needs a package that is not installed: install it, or drop the word.")
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


def _check_quantised(model: nn.Module, adapter: Adapter, arguments: GRPOArguments) -> None:
    """Refuse what quantised weights cannot do.

    Raises:
        UserError: All weights are to be trained, or to be merged for an engine.
    """
    if not models.is_quantised(model):
        return
    if adapter.rank is None:
        raise UserError(
            f"the weights of {arguments.model} are quantised and cannot be trained themselves: train a LoRA (--rank "
            "32), or load the model as it was before it was quantised."
        )
    if arguments.use_vllm and arguments.vllm_sync != ADAPTER:
        raise UserError("a LoRA cannot be merged into quantised weights at each step: drop --vllm_sync merged.")


def check_vllm() -> None:
    """Refuse `--use_vllm` where there is no vLLM, and keep it quiet where there is.

    Raises:
        UserError: vLLM is not installed.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("--use_vllm needs vLLM, which is not installed: pip install 'mua-rl[vllm]', or drop the flag.")
    if "VLLM_LOGGING_LEVEL" not in os.environ:
        logging.getLogger("vllm").setLevel(logging.WARNING)


def free_port() -> int:
    """A TCP port of this machine that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class GRPOSetup:
    """What a GRPO run is made of, before anything is written.

    Attributes:
        task, train_rows, held_out_rows: The task and its two splits.
        adapter, configuration, widths: What is trained, as the LR rules see it.
        tokenizer: The policy's tokenizer.
        base: The policy to start from, as far as a learning rate depends on it.
        policy: The model with the adapter attached.
        rate: The learning rate and its reason.
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


def prepare_grpo(arguments: GRPOArguments, adapter_arguments: AdapterArguments) -> GRPOSetup:
    """Load the policy, attach the adapter, find the learning rate, and fill in what the arguments leave to the task.

    Raises:
        UserError: Something that was given cannot be used.
    """
    _check(arguments)
    task = get_task(arguments.task, arguments.bad_rows, arguments.isolation)
    adapter = adapter_arguments.adapter("mlp")
    tokenizer = load_tokenizer(arguments)
    model, base = load_base(arguments, adapter_arguments.start_from)
    _check_quantised(model, adapter, arguments)
    rows = splits(task, is_conversational(tokenizer), arguments.held_out_problems)
    check_template(tokenizer, (prompt for split in rows for prompt in split["prompt"]), **arguments.template)
    if arguments.max_prompt_length is not None:
        rows = without_long_prompts(rows, tokenizer, arguments.max_prompt_length, arguments.template)
    assert arguments.generation_batch_size and arguments.num_generations
    check_number(rows[0], arguments.generation_batch_size // arguments.num_generations)
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
        longest, is_all = longest_prompt(tokenizer, rows[0], arguments.template)
        shares = plan_engine(arguments, policy, adapter.rank, longest, is_all)
        if shares is not None and processes.is_main():
            print(f"mua_rl: GPU memory as planned: {shares}")
    return GRPOSetup(task, adapter, tokenizer, base, policy, configuration, widths, rate, *rows)


def splits(task: Task, conversational: bool, held_out_problems: int | None) -> tuple[Dataset, Dataset]:
    """The two splits of a task, the held-out one cut to its first rows where that is asked for.

    Args:
        task: The task.
        conversational: Whether prompts are to be chat messages (`is_conversational`).
        held_out_problems: How many held-out rows to take; `None`: all.

    Raises:
        UserError: As `load_split`.
    """
    train_rows, held_out_rows = (load_split(task, held_out, conversational) for held_out in (False, True))
    if held_out_problems is not None:
        held_out_rows = held_out_rows.select(range(min(held_out_problems, len(held_out_rows))))
    return train_rows, held_out_rows


def check_number(rows: Dataset, prompts: int) -> None:
    """Refuse training rows that do not fill one step: TRL's sampler leaves out what does not.

    Raises:
        UserError: There are fewer rows than prompts in a step.
    """
    if len(rows) < prompts:
        raise UserError(
            f"the task has {len(rows)} training rows, fewer than the {prompts} prompts of a step: give more rows, or "
            "make steps smaller with --completions_per_step (prompts times --num_generations)."
        )


def without_long_prompts(
    rows: tuple[Dataset, Dataset], tokenizer: PreTrainedTokenizerBase, most: int, template: dict
) -> tuple[Dataset, Dataset]:
    """The rows of both splits whose prompts have at most so many tokens; a prompt that is cut asks something else.

    Raises:
        UserError: A split has no such row.
    """
    short = []
    for split, name in zip(rows, ("training", "held-out"), strict=True):
        lengths = [len(ids) for ids in prompt_ids(tokenizer, split["prompt"], **template)]
        kept = [row for row, length in enumerate(lengths) if length <= most]
        if not kept:
            shortest = f"the shortest has {min(lengths)}"
            raise UserError(f"every {name} prompt is longer than --max_prompt_length {most}: {shortest}.")
        if len(kept) < len(split) and processes.is_main():
            print(f"mua_rl: {len(split) - len(kept)} of {len(split)} {name} rows have longer prompts and are left out")
        short.append(split.select(kept))
    return short[0], short[1]


def check_vocabulary(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows_of_splits: Sequence[Dataset]
) -> None:
    """Refuse a tokenizer that writes the task in tokens for which the model has no embedding.

    Tokens that no prompt needs may lack one: Gemma 3's text models have a tokenizer with a token for images.

    Raises:
        UserError: A token of a prompt, or the one that ends or pads, has no embedding.
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


def longest_prompt(
    tokenizer: PreTrainedTokenizerBase, rows: Dataset, template: dict, most: int = 20_000
) -> tuple[int, bool]:
    """Tokens of the longest prompt, and whether all were counted: of more rows than `most`, those of most text are."""
    prompts, is_all = rows["prompt"], len(rows) <= most
    if not is_all:
        prompts = heapq.nlargest(most, prompts, key=lambda prompt: len(str(prompt)))
    return max(map(len, prompt_ids(tokenizer, prompts, **template))), is_all
