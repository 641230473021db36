"""One GRPO run from arguments to record."""

import os
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from rich.markup import escape
from transformers import PreTrainedModel, get_scheduler

from mua_rl.errors import EngineFailed, Unscored, UserError, one_line
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.checkpoint import check_checkpoint
from mua_rl.grpo.scored import unscored
from mua_rl.grpo.setup import GRPOSetup, prepare_grpo
from mua_rl.grpo.trainer import (
    BeginCallback,
    GRPOTrainer,
    Measure,
    ProgressBar,
    TerminationCallback,
    make_trainer,
)
from mua_rl.lr.recipe import Recipe
from mua_rl.run import hub, processes
from mua_rl.run.arguments import AdapterArguments
from mua_rl.run.folder import BEST, RunFolder, open_run, start_wandb
from mua_rl.run.life import Measurement, Names, announce, live
from mua_rl.run.termination import Termination, terminated_run

NAMES = Names("grpo", "held-out accuracy", "held_out/accuracy", "training reward", "reward", "optimizer step")


def _set_up_trainer(
    setup: GRPOSetup, arguments: GRPOArguments, run: RunFolder, is_new: bool
) -> tuple[GRPOTrainer, Measure]:
    """Make the trainer; where that fails, remove a new run's folder, which holds nothing but what was asked.

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


class GRPOLearner:
    """A GRPO run as `mua_rl.run.life` sees it.

    Args:
        setup: What the run is made of.
        arguments: What was asked.
        trainer: The trainer of the run.
        measure: The function that measures its policy on the held-out problems.
        run: The run's folder.
        termination: Whether the process was asked to end.
    """

    names = NAMES

    def __init__(
        self,
        setup: GRPOSetup,
        arguments: GRPOArguments,
        trainer: GRPOTrainer,
        measure: Measure,
        run: RunFolder,
        termination: Termination,
    ) -> None:
        self.setup, self.arguments, self.trainer, self.held_out = setup, arguments, trainer, measure
        self.recipe, self.spec = recipe_of(arguments, setup), setup.configuration.spec
        self.run, self.termination = run, termination
        self.rate, self.seed = setup.rate, arguments.seed

    @property
    def title(self) -> str:
        """See `Learner.title`."""
        return f"{self.setup.task.name}, {self.setup.configuration}, lr {self.rate.value:.3g}"

    @property
    def steps(self) -> int:
        """See `Learner.steps`."""
        return self.trainer.state.global_step

    def train(self, checkpoint: Path | None, on_begin: Callable[[], None]) -> None:
        """See `Learner.train`."""

        def begin() -> None:
            on_begin()
            stack.enter_context(self.termination.deferred())

        self.trainer.add_callback(BeginCallback(begin))
        self.trainer.add_callback(TerminationCallback(self.termination, self.arguments.optimizer_steps_per_batch))
        with ExitStack() as stack:
            try:
                self.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            finally:
                cast(ProgressBar, self.trainer.pop_callback(ProgressBar)).close()
        if self.termination.asked:
            self.termination.leave(self.run, self.steps)

    def measure(self) -> Measurement:
        """See `Learner.measure`."""
        result = self.held_out()
        text = f"{result.accuracy:.3f} ± {result.standard_error:.3f} ({len(result.scores)} problems)"
        return Measurement(result.accuracy, result.standard_error, text, result.metrics())

    def save(self, run: RunFolder) -> None:
        """See `Learner.save`."""
        self.trainer.write_policy(str(run.path / self.setup.adapter.saved_as))

    def unscored(self, metrics: list[dict[str, Any]]) -> Unscored | None:
        """See `Learner.unscored`."""
        return unscored(self.setup.task, self.arguments, self.steps, [line for line in metrics if "reward" in line])

    def remarks(self) -> list[str]:
        """See `Learner.remarks`."""
        if (best := self.run.best()) is None:
            return []
        path = self.run.path / BEST
        return [f"best on the way: {best['accuracy']:.3f} after step {best['step']:g}, for --start_from {path}"]

    def doubt(self) -> str:
        """See `Learner.doubt`."""
        return ""


def train(arguments: GRPOArguments, adapter_arguments: AdapterArguments, given: dict) -> RunFolder:
    """One run from arguments to record.

    Args:
        arguments, adapter_arguments: What to do.
        given: The settings that the run folder keeps, as `parse` returns them.

    Raises:
        UserError: Something that was given cannot be used (nothing has been written then), a reward failed, none gave a
            score in the whole run, or the hub does not take what the run has written.
        Diverged: The run left the finite numbers; its folder says so and has no LR record.
        Terminated: The process got SIGTERM; what was trained is saved.
    """
    with Termination().watched() as termination:
        return _train(arguments, adapter_arguments, given, termination)


def _train(
    arguments: GRPOArguments, adapter_arguments: AdapterArguments, given: dict, termination: Termination
) -> RunFolder:
    """See `train`."""
    if arguments.batch_is_given:
        given = {**given, "completions_per_step": arguments.completions_per_step}
    name = f"grpo-{arguments.task}-r{adapter_arguments.spec.rank or 'full'}"
    if adapter_arguments.resume is None:
        output_dir = arguments.requested_output_dir
        requeued = processes.on_main(lambda: terminated_run(output_dir, name, given))
        adapter_arguments.resume = None if requeued is None else str(requeued)
    if adapter_arguments.resume:
        check_checkpoint(RunFolder.open(adapter_arguments.resume).last_checkpoint(), arguments)
    setup = prepare_grpo(arguments, adapter_arguments)
    run, checkpoint = processes.on_main(
        lambda: open_run(adapter_arguments.resume, arguments.requested_output_dir, name, given, setup.rate.as_dict())
    )
    arguments.output_dir = str(run.path)
    if processes.is_main():
        weights = sum(p.numel() for p in setup.policy.parameters() if p.requires_grad)
        what = f"[bold]{setup.task.name}[/] with {setup.base.name}, {escape(str(setup.configuration))}"
        announce(run, f"{what}: {weights:,} trained weights", setup.rate)
    with termination.marked(run):
        trainer, measure = _set_up_trainer(setup, arguments, run, is_new=adapter_arguments.resume is None)
        live(run, GRPOLearner(setup, arguments, trainer, measure, run, termination), checkpoint)
    if arguments.push_to_hub:
        hub.push(trainer, run.path)
    return run


def recipe_of(arguments: GRPOArguments, setup: GRPOSetup) -> Recipe:
    """What the runs of these arguments have in common."""
    assert arguments.generation_batch_size and arguments.num_generations
    return Recipe(
        algorithm=NAMES.algorithm,
        task=arguments.task,
        base_model=setup.base.name,
        base_fingerprint=setup.base.fingerprint,
        widths=setup.widths,
        outputs=setup.configuration.outputs,
        target_modules=setup.adapter.target_modules,
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
            "steps": arguments.max_steps,
        },
        batch={
            "prompts": arguments.generation_batch_size // arguments.num_generations,
            "completions_per_prompt": arguments.num_generations,
            "optimizer_steps_per_batch": arguments.optimizer_steps_per_batch,
        },
        score=NAMES.score,
    )
