"""What stacked GRPO trials can be asked: the settings of a single run that they know, and the values they take."""

import math
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel
from trl.trainer.utils import disable_dropout_in_model

from mua_rl.adapter.targets import lora_layers
from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.setup import check_vllm
from mua_rl.grpo.stacked.memory import TIMES_ONE_RUN
from mua_rl.grpo.stacked.stack import check_linear
from mua_rl.rollouts.lora_engine import engine_rank
from mua_rl.run.trial import Trial

TAKEN: dict[str, tuple] = {
    "beta": (0.0,),
    "loss_type": ("dapo", "grpo", "dr_grpo"),
    "num_iterations": (1,),
    "importance_sampling_level": ("token",),
    "scale_rewards": ("group", "batch", "none"),
    "multi_objective_aggregation": ("sum_then_normalize",),
    "delta": (None,),
    "off_policy_mask_threshold": (None,),
    "top_entropy_quantile": (1.0,),
    "entropy_coef": (0.0,),
    "use_adaptive_entropy": (False,),
    "top_p": (1.0,),
    "top_k": (0, None),
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None,),
    "cast_lm_head_to_fp32": (False,),
    "use_transformers_continuous_batching": (False,),
    "use_liger_kernel": (False,),
    "gradient_checkpointing": (False,),
    "fp16": (False,),
    "optim": ("adamw_torch", "adamw_torch_fused"),
}
"""The settings that stacked trials know, with the values that they take; the loss is TRL's for all of these."""

TAKEN_BY_THE_ENGINE: dict[str, tuple] = {
    "vllm_mode": ("colocate",),
    "vllm_sync": ("adapter",),
    "vllm_enable_sleep_mode": (False,),
    "vllm_tensor_parallel_size": (1,),
    "vllm_structured_outputs_regex": (None,),
    "vllm_model_impl": ("vllm",),
    "vllm_max_model_length": (None,),
}
"""Further settings with `--use_vllm`."""


def check(arguments: GRPOArguments, trials: Sequence[Trial], memory: float = TIMES_ONE_RUN) -> None:
    """Refuse what stacked trials do not know.

    Args:
        arguments, trials, memory: See `mua_rl.grpo.stacked.trainer.StackedTrainer`.

    Raises:
        UserError: There is no trial, a trial is full finetuning, the memory is no number above 0, or a setting has a
            value that is not in `TAKEN` (with vLLM, `TAKEN_BY_THE_ENGINE`); the message says to run singly.
    """
    if not trials:
        raise UserError("there is no trial to train: give at least one.")
    for trial in trials:
        if trial.spec.rank is None:
            raise UserError("full finetuning (--rank full) shares no frozen base: run it singly.")
        if arguments.use_vllm:
            engine_rank(trial.spec.rank)
    for name, taken in {**TAKEN, **(TAKEN_BY_THE_ENGINE if arguments.use_vllm else {})}.items():
        value = getattr(arguments, name)
        value = getattr(value, "value", value)
        if value not in taken:
            raise UserError(f"trials side by side do not know --{name} {value}: drop it, or run the trials singly.")
    if arguments.steps_per_generation != arguments.gradient_accumulation_steps:
        raise UserError(
            "trials side by side make one optimizer step of each batch of completions: drop --steps_per_generation and "
            "--generation_batch_size, or run the trials singly."
        )
    if arguments.max_steps < 1:
        raise UserError("trials side by side need --max_steps.")
    if not 0 < memory < math.inf:
        raise UserError(f"the memory of trials side by side is a number of runs' above 0, not {memory}.")
    if arguments.use_vllm:
        check_vllm()


def device_of(arguments: GRPOArguments) -> torch.device:
    """The device that trials train on: the GPU where there is one, unless `--use_cpu` is given."""
    return torch.device("cuda" if torch.cuda.is_available() and not arguments.use_cpu else "cpu")


def check_policy(policy: PreTrainedModel, arguments: GRPOArguments) -> None:
    """Refuse a policy with LoRA attached that stacked trials cannot train; it is in evaluation mode afterwards.

    Raises:
        UserError: A layer with LoRA is not linear, or see `check_base`.
    """
    for name, layer in lora_layers(policy):
        check_linear(name, layer.get_base_layer())
    check_base(policy, arguments.disable_dropout)


@torch.no_grad()
def check_base(model: PreTrainedModel, disable_dropout: bool) -> None:
    """Refuse a model that `mua_rl.grpo.stacked.cache` has no attention for, or that has dropout, which a single run
    trains with; it is in evaluation mode afterwards.

    Dropout is found by what the model does, as some have layers for it and others a number among their settings.

    Raises:
        UserError: Attention cannot be exchanged or is not full attention, or the model computes something else in
            training mode.
    """
    config, name = model.config.get_text_config(), type(model).__name__
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or not getattr(model, "_supports_attention_backend", False):
        raise UserError(
            f"trials side by side take models with full attention throughout, which {name} has not: run the trials "
            "singly."
        )
    if disable_dropout:
        disable_dropout_in_model(model)
    ids = torch.arange(8, device=model.device)[None]
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        training = model.train()(input_ids=ids).logits
    evaluating = model.eval()(input_ids=ids).logits
    if not torch.allclose(training, evaluating, rtol=0.01, atol=0.01 * float(evaluating.abs().max())):
        cure = "run the trials singly" if disable_dropout else "set --disable_dropout true, or run the trials singly"
        raise UserError(f"trials side by side do not know dropout, which {name} has: {cure}.")
