"""GRPO: TRL's trainer with the optimizer groups of `mua_rl.adapter.groups`, and the callbacks of a run."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mua_rl.adapter.groups import learning_rates, param_groups
from mua_rl.errors import CannotLearn, Diverged
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.setup import GRPOSetup
from mua_rl.lm.heldout import HeldOutResult, gather, held_out
from mua_rl.rollouts.correction import CorrectedGRPOTrainer
from mua_rl.rollouts.sync import generation_class
from mua_rl.run import processes
from mua_rl.run.folder import BEST, RunFolder
from mua_rl.run.judge import why_no_learning
from mua_rl.run.termination import Termination

Measure = Callable[[], HeldOutResult]


class GRPOTrainer(CorrectedGRPOTrainer):
    """TRL's `GRPOTrainer` for a policy that an adapter of ours is attached to.

    Args:
        model: The policy; a copy of it is the reference policy where one is wanted (`--beta`).
        roles: The learning rate of each role of trained parameters (`Adapter.learning_rates`).
        options: Further arguments of `SeamedTrainer`.
    """

    def __init__(self, model: nn.Module, *, roles: dict[str, float], **options: Any) -> None:
        self.roles = roles
        super().__init__(model, **options)
        plugin: Any = getattr(self.accelerator.state, "fsdp_plugin", None)
        if plugin is not None and self.accelerator.mixed_precision != "no":
            # accelerate would have gradients summed over the processes, and log-probs returned, in bf16.
            policy = plugin.mixed_precision_policy
            plugin.mixed_precision_policy = replace(policy, reduce_dtype=torch.float32, output_dtype=None)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Make named groups instead of the Trainer's two; the schedule multiplies each group's own peak."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            options.pop("lr", None)
            decayed = self.get_decay_parameter_names(model)
            groups = param_groups(model, self.roles, self.args.weight_decay, decayed=decayed)
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer


def make_trainer(setup: GRPOSetup, arguments: GRPOArguments, run: RunFolder) -> tuple[GRPOTrainer, Measure]:
    """The trainer of a run, and the function that measures its policy on the held-out problems."""

    def measure() -> HeldOutResult:
        assert arguments.max_completion_length is not None
        rows, new_tokens = setup.held_out_rows, arguments.max_completion_length
        own = rows.select(processes.share_of(len(rows)))
        result = held_out(trainer.model, setup.tokenizer, setup.task, own, new_tokens, template=arguments.template)
        return gather(result, len(rows))

    trainer = GRPOTrainer(
        model=setup.policy,
        roles=setup.adapter.learning_rates(setup.rate.value),
        engine=generation_class(setup.adapter.rank, arguments.vllm_sync),
        reward_funcs=setup.task.checked_rewards,
        args=arguments,
        train_dataset=setup.train_rows,
        processing_class=setup.tokenizer,
    )
    save = trainer.write_policy if arguments.save_best else None
    trainer.add_callback(RunCallback(run, lambda: measure().metrics(), arguments.held_out_steps, save))
    for callback in (ProgressCallback, PrinterCallback):  # either prints a long dictionary every step
        trainer.remove_callback(callback)
    trainer.add_callback(ProgressBar())
    return trainer, measure


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
        save: Writes the policy to a folder; `None`: the best one is not kept.
    """

    PATIENCE = 3

    def __init__(
        self,
        run: RunFolder,
        held_out_metrics: Callable[[], dict[str, float]],
        held_out_steps: int,
        save: Callable[[str], None] | None = None,
    ) -> None:
        self.run, self.save = run, save
        self.held_out_metrics = held_out_metrics
        self.held_out_steps = held_out_steps
        self.used: dict[str, float] = {}
        self.bad_steps = 0
        self.history: list[dict[str, Any]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Note the learning rates that this very step uses; drop its gradient where that is not finite.

        Raises:
            Diverged: The gradient was not finite in `PATIENCE` steps in a row.
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
        """Measure the policy on the way."""
        if self.held_out_steps and state.global_step % self.held_out_steps == 0 and state.global_step < state.max_steps:
            metrics = self.held_out_metrics()
            if state.is_world_process_zero:
                self.run.log(state.global_step, metrics)
            accuracy = metrics["held_out/accuracy"]
            if self.save is not None and processes.on_main(lambda: self.run.is_best(accuracy)):
                self.save(str(self.run.path / BEST))
                if state.is_world_process_zero:
                    self.run.note_best(state.global_step, accuracy)

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


class TerminationCallback(TrainerCallback):
    """Saves a checkpoint and stops training where a process of the run was asked to end.

    Args:
        termination: What was asked of this process.
        steps_per_batch: Optimizer steps of a batch of completions; a run goes on after whole batches alone.
    """

    def __init__(self, termination: Termination, steps_per_batch: int) -> None:
        self.termination, self.steps_per_batch = termination, steps_per_batch

    def on_step_end(self, args, state, control, **kwargs):
        """Save and stop at the end of a batch."""
        asked = processes.total(float(self.termination.asked), args.device)
        if asked and state.global_step % self.steps_per_batch == 0:
            self.termination.asked = True  # by one of the processes, for all
            control.should_save = control.should_training_stop = True


class BeginCallback(TrainerCallback):
    """Calls a function before the first step: where weights are sharded, only then are they in their places."""

    def __init__(self, on_begin: Callable[[], None]) -> None:
        self.on_begin = on_begin

    def on_train_begin(self, args, state, control, **kwargs):
        """Call the function."""
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
