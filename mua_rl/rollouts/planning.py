"""What a run's arguments leave open about its engine and its passes, filled in from what fits on the GPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mua_rl.errors import UserError
from mua_rl.rollouts.lora_engine import check_layers, engine_rank
from mua_rl.rollouts.memory import Plan, PolicySize, plan, trainer_memory, usable
from mua_rl.rollouts.sync import ADAPTER
from mua_rl.run import processes

_TRL_UTILIZATION = 0.3
_SPARE_TOKENS = 32  # for a chat template's options, which the measuring of prompts does not know


def plan_engine(
    arguments: Any, policy: nn.Module, rank: int | None, prompt_tokens: int, is_longest: bool = True
) -> Plan | None:
    """Fill in what the arguments leave open about the engine, and refuse what cannot work, before anything is written.

    Args:
        arguments: `GRPOArguments`; `vllm_max_model_length` and `vllm_gpu_memory_utilization` are set where they are
            `None`, and the passes of a step where they are open, on a GPU as wide as it allows.
        policy: The model with its adapter attached.
        rank: `Adapter.rank`.
        prompt_tokens: Of the longest prompt.
        is_longest: Whether certainly none is longer, so that the engine need not take a longer one.

    Returns:
        The shares of the GPU; `None` where the user has set the engine's, or there is no GPU to share.

    Raises:
        UserError: vLLM has no such LoRA, or the GPU is too small.
    """
    if rank is not None and arguments.vllm_sync == ADAPTER:
        engine_rank(rank)
        check_layers(policy)
    elif not torch.accelerator.is_available():
        raise UserError(
            "vLLM on a CPU packs its weights as it loads them and takes no others later: only LoRA with --vllm_sync "
            "adapter works there. Drop --use_vllm."
        )
    longest = int(policy.config.get_text_config().max_position_embeddings)  # type: ignore[operator,union-attr]
    length = min(longest, prompt_tokens + arguments.max_completion_length)
    if arguments.vllm_max_model_length is None and is_longest:
        arguments.vllm_max_model_length = min(longest, length + _SPARE_TOKENS)
    colocated, given = arguments.vllm_mode == "colocate", arguments.vllm_gpu_memory_utilization
    if given is None and not (colocated and torch.cuda.is_available()):
        arguments.vllm_gpu_memory_utilization = _TRL_UTILIZATION
    if not torch.cuda.is_available():
        return None
    own, total = torch.cuda.mem_get_info()
    free = min(processes.gathered([own]))  # all processes take the same passes
    sequences = arguments.per_device_train_batch_size * arguments.steps_per_generation
    size = PolicySize.of(policy)
    work: dict[str, Any] = {
        "length": length,
        "compute_bytes": 2 if arguments.bf16 or arguments.fp16 else 4,
        "checkpointing": arguments.gradient_checkpointing,
        "processes": processes.count(),
        "sharded": processes.sharded(),
    }
    if given is not None or not colocated:
        room = usable(free) - (int(given * total) if colocated else 0)
        _widen(
            arguments,
            lambda completions: trainer_memory(size, micro_batch=completions, **work).total <= room,
        )
        return None

    def shares(completions: int) -> Plan:
        return plan(
            size,
            total=total,
            free=free,
            micro_batch=completions,
            sequences=sequences,
            longest=arguments.vllm_max_model_length or longest,
            sleeps=arguments.vllm_enable_sleep_mode,
            **work,
        )

    def roomy(completions: int) -> bool:
        try:
            return shares(completions).roomy
        except UserError:
            return False

    _widen(arguments, roomy)
    made = shares(arguments.per_device_train_batch_size)
    arguments.vllm_gpu_memory_utilization = made.utilization
    return made


def _widen(arguments: Any, fits: Callable[[int], bool]) -> None:
    """Take the widest passes that make the same step and fit: a small model does a wide one in a narrow one's time."""
    *wider, _ = arguments.wider_passes()
    for completions, passes in wider:
        if fits(completions):
            arguments.set_passes(completions, passes)
            return
