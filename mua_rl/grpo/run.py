"""One GRPO run from arguments to record."""

import os
import shutil
import time
from collections.abc import Callable
from typing import cast

import torch
from transformers import PreTrainedModel, PrinterCallback, ProgressCallback, get_scheduler

from mua_rl.envs.tasks import is_scored, unscored
from mua_rl.errors import Diverged, EngineFailed, UserError, one_line
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.checkpoint import check_checkpoint
from mua_rl.grpo.report import announce, report
from mua_rl.grpo.setup import Setup, prepare
from mua_rl.grpo.trainer import GRPOTrainer, ProgressBar, RunCallback, Start
from mua_rl.lm.heldout import HeldOutResult, gather, held_out
from mua_rl.lr.record import LRRecord, package_versions
from mua_rl.rollouts.sync import generation_class
from mua_rl.run import hub, plots, processes
from mua_rl.run.arguments import AdapterArguments
from mua_rl.run.folder import CURVE, RunFolder, open_run, start_wandb
from mua_rl.run.trial import is_clear

Measure = Callable[[], HeldOutResult]


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
        check_checkpoint(RunFolder.open(adapter_arguments.resume).last_checkpoint(), arguments)
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
