"""GRPO: TRL's trainer with the optimizer groups of `mua_rl.adapter.groups`, and the callbacks of a run."""

import copy
import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, ProgressCallback, TrainerCallback
from trl.generation.vllm_generation import VLLMGeneration
from trl.trainer import grpo_trainer as trl_grpo_trainer

from mua_rl.adapter.groups import learning_rates, param_groups
from mua_rl.errors import CannotLearn, Diverged
from mua_rl.lm.text import begins_answer, completion_texts, prompt_ids
from mua_rl.rollouts.correction import CorrectedGRPOTrainer
from mua_rl.rollouts.sync import replaced
from mua_rl.run import processes
from mua_rl.run.folder import RunFolder
from mua_rl.run.judge import why_no_learning


class GRPOTrainer(CorrectedGRPOTrainer):
    """TRL's `GRPOTrainer` for a policy that an adapter of ours is attached to.

    Args:
        model: The policy; a copy of it is the reference policy where one is wanted (`--beta`).
        roles: Learning rate of each role of trained parameters (`Adapter.learning_rates`).
        generation: How the policy gets to a vLLM engine (`mua_rl.rollouts.generation_class`); `None` is TRL's way.
        args, kwargs: As TRL's.
    """

    def __init__(
        self,
        model: nn.Module,
        *args: Any,
        roles: dict[str, float],
        generation: type[VLLMGeneration] | None = None,
        **kwargs: Any,
    ) -> None:
        self.roles = roles
        with ExitStack() as stack:
            if generation:
                stack.enter_context(replaced(trl_grpo_trainer, "VLLMGeneration", generation))
            # TRL would load the reference policy by name, and what the policy starts from may be in no such folder.
            start = replaced(trl_grpo_trainer, "create_model_from_path", lambda *_, **__: copy.deepcopy(model))
            stack.enter_context(start)
            super().__init__(cast(PreTrainedModel, model), *args, **kwargs)
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None:
            assert self.model is not None
            for module in self.model.modules():
                if isinstance(module, PreTrainedModel):
                    # transformers' mark by which `generate` goes on until every process has its answers.
                    module._is_fsdp_managed_module = True  # type: ignore[assignment]
        if plugin is not None and self.accelerator.mixed_precision != "no":
            # accelerate would have gradients summed over the processes, and log-probs returned, in bf16.
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)

    def _tokenize_prompts(self, prompts: list) -> tuple:
        """As TRL's, which would close an answer that a row has begun, and open a second one."""
        if self.environment_factories is None and not self._is_vlm and any(map(begins_answer, prompts)):
            options = {"chat_template": self.chat_template, "tools": self.tools or None}
            options |= cast(dict, self.chat_template_kwargs)
            return prompt_ids(self.processing_class, prompts, **options), None, {}
        return super()._tokenize_prompts(prompts)

    def _generate(self, prompts: list) -> Any:
        """As TRL's, which would take tags that are special tokens out of the text that rewards get."""
        with replaced(self.processing_class, "batch_decode", lambda ids, **_: completion_texts(self._tokenizer, ids)):
            return super()._generate(prompts)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Named groups instead of the Trainer's two anonymous ones; the schedule multiplies each group's own peak."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            options.pop("lr", None)
            groups = param_groups(
                model, self.roles, self.args.weight_decay, decayed=self.get_decay_parameter_names(model)
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Nothing where a resumed run has taken all of its steps already: transformers would take one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As the Trainer's, which of several adapters loads those in subfolders alone: TRL's frozen "ref" (`--beta`).

        The policy's own, at the top, would be a new one then.
        """
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        policy = self.model if model is None else model
        if isinstance(policy, PeftModel) and len(policy.peft_config) > 1 and not self.is_fsdp_enabled:
            policy.load_adapter(resume_from_checkpoint, policy.active_adapter, is_trainable=True)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As the Trainer's, without the second copy that FSDP2 makes of a tied weight."""
        if state_dict is not None:
            tied = getattr(self.model, "all_tied_weights_keys", None) or {}
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        super()._save(output_dir, state_dict)


_FEWEST_ENTRIES = 5  # in the metrics, by which a run is judged: an entry has the gradient of its last step alone


class RunCallback(TrainerCallback):
    """Writes the metrics, measures held-out accuracy on the way, and stops a run that diverges.

    A step whose gradient is not finite changes nothing (`gradient_not_finite` in the metrics marks it): one bad batch
    need not cost the run. After `PATIENCE` of them in a row the run has diverged. A run whose steps teach nothing any
    more is stopped (`mua_rl.run.judge`).

    Args:
        run: Where metrics go.
        held_out_metrics: Measures held-out accuracy; called every `held_out_steps` steps.
        held_out_steps: 0 for never.
    """

    PATIENCE = 3

    def __init__(self, run: RunFolder, held_out_metrics: Callable[[], dict[str, float]], held_out_steps: int) -> None:
        self.run = run
        self.held_out_metrics = held_out_metrics
        self.held_out_steps = held_out_steps
        self.used: dict[str, float] = {}
        self.bad_steps = 0
        self.history: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Note the learning rates that this very step uses; drop its gradient where that is not finite.

        Raises:
            Diverged: It was not in as many steps in a row as patience allows.
        """
        self.used = {f"lr/{name}": rate for name, rate in learning_rates(optimizer).items()}
        trained = [p for p in model.parameters() if p.grad is not None]
        if trained:
            norms = torch._foreach_norm([p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad for p in trained])
            not_finite = not math.isfinite(float(torch.stack(norms).sum()))
        else:  # DeepSpeed keeps gradients elsewhere, and has taken the step by now, or left it out as is done here
            not_finite = getattr(optimizer, "step_was_skipped", False)
        if not processes.total(float(not_finite), args.device):  # where weights are sharded, each has its own share
            self.bad_steps = 0
            return
        self.bad_steps += 1
        self.used["gradient_not_finite"] = 1.0
        for parameter in trained:
            parameter.grad = None  # the optimizer leaves such parameters alone
        if self.bad_steps == self.PATIENCE:
            raise Diverged(
                f"the gradient was not finite in {self.PATIENCE} steps in a row, up to step {state.global_step + 1}"
            )

    def on_train_begin(self, args, state, control, **kwargs):
        """Recall the metrics of a run that is resumed."""
        self.history = processes.on_main(lambda: [line for line in self.run.metrics() if "loss" in line])

    def on_step_end(self, args, state, control, **kwargs):
        """Measure on the way."""
        if self.held_out_steps and state.global_step % self.held_out_steps == 0 and state.global_step < state.max_steps:
            metrics = self.held_out_metrics()
            if state.is_world_process_zero:
                self.run.log(state.global_step, metrics)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Write one line of metrics a step.

        Raises:
            CannotLearn: The steps have taught nothing for as long as `--patience` allows.
        """
        if not logs or "loss" not in logs:
            return
        if state.is_world_process_zero:
            self.run.log(state.global_step, {**logs, **self.used})
        self.history.append(logs)
        patience = max(_FEWEST_ENTRIES, math.ceil(args.patience / state.logging_steps))
        going_on = state.global_step < state.max_steps
        if args.patience and going_on and (reason := why_no_learning(self.history, patience)):
            raise CannotLearn(f"{reason} (step {state.global_step} of {state.max_steps})")


class BeginCallback(TrainerCallback):
    """Calls a function before the first step: where weights are sharded, only then are they in their places."""

    def __init__(self, on_begin: Callable[[], None]) -> None:
        self.on_begin = on_begin

    def on_train_begin(self, args, state, control, **kwargs):
        """Call it."""
        self.on_begin()


class ProgressBar(ProgressCallback):
    """The Trainer's bar with reward and length beside it, instead of a dictionary printed every step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Refresh the figures beside the bar."""
        if self.training_bar is not None and logs and logs.get("reward") is not None:  # None: no reward gave a score
            self.training_bar.set_postfix(
                reward=f"{logs['reward']:.3f}", tokens=f"{logs.get('completions/mean_length', 0):.0f}", refresh=False
            )

    def close(self) -> None:
        """End the bar's line where training was cut short, so that what is said of it comes after the bar."""
        if self.training_bar is not None:
            self.training_bar.close()
