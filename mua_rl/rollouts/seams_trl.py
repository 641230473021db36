"""What we use of TRL, and of transformers' Trainer below it, beyond their public API; docs/seams.md has the table.

`SeamedTrainer` turns it into calls of ours: an engine is attached, log-probs are asked for, metrics are noted, and the
loss is corrected, without any other module touching a name that begins with an underscore.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast
from unittest import mock

import torch
import trl
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from trl.generation import vllm_generation
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer
from trl.trainer.utils import pad

from mua_rl.lm.text import begins_answer, completion_texts, prompt_ids
from mua_rl.rollouts.fsdp2 import output_layer_called


class SeamedTrainer(trl.GRPOTrainer):
    """TRL's `GRPOTrainer` with rollouts by an engine of ours and a loss that is corrected on the way.

    Args:
        model: The policy; a copy of it is the reference policy where one is wanted (`--beta`).
        engine: The engine's class, with `--use_vllm`; `None` is TRL's own.
        args: TRL's configuration.
        options: Further arguments of TRL's trainer.
    """

    def __init__(self, model: nn.Module, args: Any, engine: type[VLLMGeneration] | None = None, **options: Any) -> None:
        trained = [(p, p.data) for p in model.parameters() if p.requires_grad]
        uses_engine, args.use_vllm = args.use_vllm, False  # TRL would make an engine of its own kind
        if uses_engine:
            options["rollout_func"] = lambda prompts, trainer: trainer.rollouts(prompts)
        try:
            with warnings.catch_warnings(), _reference_policy(model):
                warnings.filterwarnings("ignore", message="You are using 'rollout_func'")
                super().__init__(cast(PreTrainedModel, model), args=args, **options)
        finally:
            args.use_vllm = uses_engine
        for parameter, data in trained:  # TRL rounds a LoRA on a quantised base to bf16
            parameter.data = data
        if uses_engine:
            self.use_vllm, self._last_loaded_step = True, -1
            self.vllm_generation = _start_engine(self, engine or VLLMGeneration)
        if self.is_fsdp_enabled:
            for module in self.policy.modules():
                if isinstance(module, PreTrainedModel):
                    # transformers' mark by which `generate` goes on until every process has its answers.
                    module._is_fsdp_managed_module = True  # type: ignore[assignment]

    @property
    def policy(self) -> nn.Module:
        """The policy."""
        assert self.model is not None
        return self.model

    def note(self, name: str, value: float) -> None:
        """Add a value to the metrics of the step, which has the mean of all."""
        self._metrics["train" if self.policy.training else "eval"][name].append(value)

    def prompt_ids(self, prompts: list) -> list[list[int]]:
        """Token ids of prompts; a group asks the same one many times, and it is tokenized once."""
        distinct = {repr(prompt): prompt for prompt in prompts}
        ids = prompt_ids(self._tokenizer, list(distinct.values()), **cast(dict, self.chat_template_kwargs))
        by_prompt = dict(zip(distinct, ids, strict=True))
        return [list(by_prompt[repr(prompt)]) for prompt in prompts]

    def _tokenize_prompts(self, prompts: list) -> tuple:
        """Tokenize prompts as TRL does, which would close an answer that a row has begun, and open a second one."""
        if self.environment_factories is None and not self._is_vlm and any(map(begins_answer, prompts)):
            return self.prompt_ids(prompts), None, {}
        return super()._tokenize_prompts(prompts)

    def _generate(self, prompts: list) -> Any:
        """Generate as TRL does, which would take tags that are special tokens out of the text that rewards get."""
        texts: Callable[..., list[str]] = lambda ids, **_: completion_texts(self._tokenizer, ids)  # noqa: E731
        with mock.patch.object(self.processing_class, "batch_decode", texts):
            return super()._generate(prompts)

    def rollouts(self, prompts: list) -> dict[str, list]:
        """The engine's completions of a batch of prompts, as TRL's `rollout_func` returns them."""
        group = cast(int, self.num_generations if self.policy.training else self.num_generations_eval)
        ids = self.prompt_ids(prompts)
        _, completion_ids, log_probs, _ = self.vllm_generation.generate(ids, images=None, num_generations=group)
        return {
            "prompt_ids": ids,
            "completion_ids": completion_ids,
            "logprobs": [[token[0] for token in row] for row in log_probs],
        }

    def log_probs(self, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
        """The trainer's log-probs `(sequences, tokens)` of completions, padded on the right."""
        left, right = [torch.tensor(ids) for ids in prompts], [torch.tensor(ids) for ids in completions]
        sides = [(left, "left"), (right, "right")]
        fill = self._tokenizer.pad_token_id
        ids = torch.cat([pad(rows, padding_value=fill, padding_side=side) for rows, side in sides], 1)
        mask = torch.cat([pad([torch.ones_like(r) for r in rows], padding_side=side) for rows, side in sides], 1)
        device = self.accelerator.device
        length = max(len(row) for row in completions)
        return self._get_per_token_logps_and_entropies(self.model, ids.to(device), mask.to(device), length)[0]

    # The correction for rollouts of an engine. TRL takes the ratio of trainer to engine from a forward pass of its own;
    # where a batch is used for one optimizer step, the loss computes the same a moment later.

    _corrected: dict[str, Any] | None = None

    @property
    def corrects_in_loss(self) -> bool:
        """Whether the loss sees each batch with the weights that it was sampled with.

        With more optimizer steps per batch than one, TRL's own pass is needed for the ratio of PPO as well.
        """
        args: Any = self.args
        one_step = args.gradient_accumulation_steps % (args.steps_per_generation * self.num_iterations) == 0
        return self.use_vllm and self.vllm_importance_sampling_correction and one_step

    def correction(self, trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The factor of the loss, `(sequences, tokens)` or `(sequences, 1)`, from log-probs `(sequences, tokens)`."""
        raise NotImplementedError

    def watch(self, trainer: torch.Tensor, engine: torch.Tensor, mask: torch.Tensor) -> None:
        """Look at the log-probs of a batch, `(sequences, tokens)` each, where TRL itself corrects."""

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if self.corrects_in_loss:
            with mock.patch.object(self, "vllm_importance_sampling_correction", False):
                return super()._generate_and_score_completions(inputs)
        output = super()._generate_and_score_completions(inputs)
        if "old_per_token_logps" in output and "sampling_per_token_logps" in output:
            self.watch(output["old_per_token_logps"], output["sampling_per_token_logps"], _counted(output))
        return output

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._corrected = inputs if self.corrects_in_loss and "sampling_per_token_logps" in inputs else None
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._corrected = None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> tuple:
        with output_layer_called(model):
            result = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if (inputs := self._corrected) is not None:
            engine, mask = inputs["sampling_per_token_logps"], _counted(inputs)
            inputs["importance_sampling_ratio"] = self.correction(result[0].detach(), engine, mask)
        return result

    # transformers' Trainer.

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing where a resumed run has taken all of its steps already: transformers would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load the policy's own adapter, too, where TRL has put its frozen "ref" beside it (`--beta`).

        Of several adapters the Trainer loads those in subfolders alone, and the policy's is at the top.
        """
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        policy = self.model if model is None else model
        if isinstance(policy, PeftModel) and len(policy.peft_config) > 1 and not self.is_fsdp_enabled:
            policy.load_adapter(resume_from_checkpoint, policy.active_adapter, is_trainable=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """Save without the second copy that FSDP2 makes of a tied weight."""
        if state_dict is not None:
            tied = getattr(self.model, "all_tied_weights_keys", None) or {}
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)

    def write_policy(self, folder: str) -> None:
        """Write what was trained, without a push to the hub, which `save_model` would make on the way."""
        self.save_model(folder, _internal_call=True)


class SeamedEngine(VLLMGeneration):
    """TRL's vLLM engine, colocated or on a server, with its parts under names of our own."""

    def make_llm(self, **options: Any) -> Any:
        """The engine of a colocated run.

        Args:
            options: Those that TRL makes `vllm.LLM` with.
        """
        raise NotImplementedError

    def _init_vllm(self) -> None:
        with mock.patch.object(vllm_generation, "LLM", self.make_llm):  # by which name TRL makes it
            super()._init_vllm()

    @property
    def weights_sleep(self) -> bool:
        """Whether the engine has given its weights back (`--vllm_enable_sleep_mode`)."""
        return self._llm_weights_sleeping

    def wake(self) -> None:
        """Bring the engine's memory for weights back."""
        self.llm.wake_up(tags=["weights"])
        self._llm_weights_sleeping = False

    @property
    def gathers_one_by_one(self) -> bool:
        """Whether weights are whole one at a time (ZeRO-3)."""
        return self._dist.is_zero3

    def gathered(self, weights: list) -> Any:
        """A context in which weights are whole that DeepSpeed shards; FSDP2's are gathered one by one."""
        return self._dist.gather_params(weights)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """All weights under the names that vLLM knows; every process of a run must go through them."""
        return self._iter_named_params()


def _start_engine(trainer: SeamedTrainer, kind: type[VLLMGeneration]) -> VLLMGeneration:
    """The engine of a trainer, with TRL's own arguments."""
    args: Any = trainer.args
    return kind(
        model=cast(PreTrainedModel, trainer.model),
        accelerator=trainer.accelerator,
        processing_class=trainer._tokenizer,
        mode=args.vllm_mode,
        structured_outputs_regex=args.vllm_structured_outputs_regex,
        server_base_url=args.vllm_server_base_url,
        server_host=args.vllm_server_host,
        server_port=args.vllm_server_port,
        group_port=args.vllm_group_port,
        server_timeout=args.vllm_server_timeout,
        tensor_parallel_size=args.vllm_tensor_parallel_size,
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        max_model_length=args.vllm_max_model_length,
        max_num_seqs=args.per_device_train_batch_size * args.vllm_tensor_parallel_size * args.steps_per_generation,
        enable_sleep_mode=args.vllm_enable_sleep_mode,
        model_impl=args.vllm_model_impl,
        trust_remote_code=args.trust_remote_code,
        repetition_penalty=args.repetition_penalty,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        max_completion_length=args.max_completion_length,
        logprobs=0,  # of the sampled token alone
        generation_kwargs=args.generation_kwargs,
    )


@contextmanager
def _reference_policy(model: nn.Module) -> Iterator[None]:
    """Within the block TRL's reference policy is a copy of the model.

    TRL would load it by name, and what a policy starts from may be in no folder of that name.
    """
    load: Callable[..., nn.Module] = lambda *_, **__: copy.deepcopy(model)  # noqa: E731
    with mock.patch.object(grpo_trainer, "create_model_from_path", load):
        yield


def _counted(inputs: dict[str, Any]) -> torch.Tensor:
    """The mask of the tokens that the policy wrote and the loss counts."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
