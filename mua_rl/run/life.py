"""The life of a run, the same for every algorithm: before → train → after → result, record, plot, closing table."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from mua_rl.errors import CannotLearn, Diverged, PolicyWorse, Unscored
from mua_rl.lr.recipe import Recipe
from mua_rl.lr.record import FILE_NAME, LRRecord
from mua_rl.lr.spec import AdapterSpec
from mua_rl.lr.transfer import LearningRate, gives_full_finetuning
from mua_rl.run import plots, processes
from mua_rl.run.commands import from_policy, full_finetuning, other_ranks
from mua_rl.run.folder import CURVE, RunFolder
from mua_rl.run.trial import Status, TrialResult, clear_change, has_gained

SCORES = "scores_before"
"""The key, in a run's metrics, of the scores before the first step."""


@dataclass(frozen=True)
class Measurement:
    """What the policy reaches on what it was not trained on.

    Attributes:
        score: Held-out accuracy, or mean return.
        standard_error: The standard error of the score, over problems or episodes.
        text: Both, as the closing table shows them.
        metrics: Further numbers for the run's metrics, by their keys.
        scores: The score of each problem or episode, in the same order every time, so that two measurements are
            compared pair by pair; nothing: they are compared by the standard error.
    """

    score: float
    standard_error: float
    text: str
    metrics: dict[str, float] = field(default_factory=dict)
    scores: Sequence[float] = ()


@dataclass(frozen=True)
class Names:
    """What an algorithm calls its measures.

    Attributes:
        algorithm: The algorithm, as in an LR record and as a command.
        score, score_key: The held-out measure, for the reader and in the metrics.
        reward, reward_key: The training reward, for the reader and in the metrics.
        step: What is counted as a step.
        is_command: Whether `python -m mua_rl.ALGORITHM` runs it.
    """

    algorithm: str
    score: str
    score_key: str
    reward: str
    reward_key: str
    step: str
    is_command: bool = True


class Learner(Protocol):
    """A policy and its training, as the life of a run needs them.

    Attributes:
        names: What its algorithm calls its measures.
        recipe: How it is trained, for its LR record.
        spec, rate, seed: What is trained, at which learning rate, with which seed.
    """

    names: Names
    recipe: Recipe
    spec: AdapterSpec
    rate: LearningRate
    seed: int

    @property
    def title(self) -> str:
        """What is trained, on what: the title of the learning curve."""

    @property
    def steps(self) -> int:
        """Steps that were taken so far."""

    def train(self, checkpoint: Path | None, on_begin: Callable[[], None]) -> None:
        """Train to the end, from a checkpoint where one is given; `on_begin` is called before the first step.

        Raises:
            Diverged: Training left the finite numbers.
            CannotLearn: Training taught nothing any more.
        """

    def measure(self) -> Measurement:
        """Measure the policy as it is now; all processes of a run call this together."""

    def save(self, run: RunFolder) -> None:
        """Write what was trained; all processes of a run call this together."""

    def unscored(self, metrics: list[dict[str, Any]]) -> Unscored | None:
        """What to say where, by the lines of metrics, no step could teach anything; `None`: one could."""

    def remarks(self) -> list[str]:
        """Further lines for a run that ended well: where the policy is, say."""

    def doubt(self) -> str:
        """What else than the learning rate may have made a policy worse; "" for nothing."""


def live(run: RunFolder, learner: Learner, checkpoint: Path | None = None) -> TrialResult:
    """Live a run: measure, train, measure again, and write down what came of it; a record only where it went well.

    Args:
        run: The run's folder, which has begun.
        learner: What is trained.
        checkpoint: The checkpoint that the run goes on from; `None` where it begins.

    Returns:
        The result, on every process.

    Raises:
        Diverged: Training left the finite numbers; the folder says so.
        CannotLearn: Training was stopped; the folder says so.
        Unscored: No step could teach anything; the folder says so.
    """
    start = _Start(run, learner)
    try:
        learner.train(checkpoint, start)
    except (Diverged, CannotLearn) as error:
        if processes.is_main():
            _finish(run, learner, _result_of_failure(run, learner, start, error))
        raise
    seconds = time.perf_counter() - start.time
    after = learner.measure()
    learner.save(run)
    result = processes.on_main(lambda: _close(run, learner, start, after, seconds))
    if result.status is Status.UNSCORED:
        raise Unscored(result.reason)
    return result


def raise_if_worse(run: RunFolder) -> None:
    """Give a command whose policy got worse its exit code.

    Raises:
        PolicyWorse: The run's policy ended worse than it began.
    """
    result = run.result()
    if result is not None and result.status is Status.WORSE:
        raise PolicyWorse(f"the policy got worse, {result.before:.4g} → {result.score:.4g}: see {run.path}.")


class _Start:
    """Measures the policy before its first step; once in a run's life, also where it is resumed.

    Attributes:
        before: The score before the first step.
        text: The measurement as the closing table shows it.
        scores: The score of each problem or episode; nothing where they are not compared pair by pair.
        time: When training began, by `time.perf_counter`.
        step: The step that training began after: 0, or that of the checkpoint.
    """

    def __init__(self, run: RunFolder, learner: Learner) -> None:
        self.run, self.learner = run, learner
        self.before, self.text, self.time, self.step = math.nan, "", time.perf_counter(), 0
        self.scores: Sequence[float] = ()

    def __call__(self) -> None:
        known = processes.on_main(self.run.score_before)
        if known is None:
            measurement = self.learner.measure()
            known = measurement.score, measurement.text
            if processes.is_main():
                key = self.learner.names.score_key
                values = {key: measurement.score, **measurement.metrics, "before": measurement.text}
                scores = {SCORES: list(measurement.scores)} if measurement.scores else {}
                self.run.log(0, {**values, **scores})
        self.before, self.text = known
        self.scores = next((line[SCORES] for line in self.run.metrics() if SCORES in line), [])
        self.time, self.step = time.perf_counter(), self.learner.steps


def _result_of_failure(run: RunFolder, learner: Learner, start: _Start, error: Exception) -> TrialResult:
    """The result of a run that left the finite numbers, or was stopped."""
    seconds = time.perf_counter() - start.time
    if isinstance(error, Diverged):
        return TrialResult.of_divergence(start.before, learner.steps, seconds, str(error))
    rewards, nothing = run.rewards(learner.names.reward_key), math.nan
    return TrialResult.of_training(nothing, nothing, start.before, rewards, learner.steps, seconds, str(error))


def _close(run: RunFolder, learner: Learner, start: _Start, after: Measurement, seconds: float) -> TrialResult:
    """Write and show what a run that has ended came to."""
    names = learner.names
    run.log(learner.steps, {names.score_key: after.score, **after.metrics})
    rewards = run.rewards(names.reward_key)
    paired = len(start.scores) == len(after.scores) > 0
    fall = clear_change(start.scores, after.scores) if paired else None
    result = TrialResult.of_training(
        after.score, after.standard_error, start.before, rewards, learner.steps, seconds, clear_fall=fall
    )
    metrics = run.metrics()
    if unscored := learner.unscored(metrics):
        result = result.with_status(Status.UNSCORED, str(unscored))
    if result.status is not Status.UNSCORED:
        curves = {names.reward_key: names.reward, names.score_key: names.score}
        plots.learning_curve(metrics, run.path / CURVE, learner.title, curves, names.step)
    if result.status is Status.OK and (not paired or has_gained(start.scores, after.scores)):
        _record(learner, start.before, after.score).save(run.path)
    _finish(run, learner, result, seconds_per_step=seconds / max(1, learner.steps - start.step))
    if result.status is not Status.UNSCORED:
        report(run, learner, result, (start.text, after.text), rewards)
    return result


def _record(learner: Learner, before: float, after: float) -> LRRecord:
    """The LR record of a run that has ended well: no more than that, and a guess stays a guess."""
    rate, evidence = learner.rate, "guess" if learner.rate.is_guess else "run"
    scores, seeds = (before, after), [learner.seed]
    return learner.recipe.record(learner.spec, rate.value, scores, seeds, evidence, rate.reason, learner.steps)


def _finish(run: RunFolder, learner: Learner, result: TrialResult, **facts: float) -> None:
    """Write the result, with what it was reached by."""
    rate = {"learning_rate": learner.rate.value, "learning_rate_reason": learner.rate.reason}
    run.finish(result, {"metric": learner.names.score, **rate, **facts})


def announce(run: RunFolder, what: str, rate: LearningRate) -> None:
    """Say what a run is about to do, before its first step."""
    say(what)
    say(f"learning rate [bold]{rate.value:.4g}[/]: {escape(rate.reason)}")
    if rate.warning:
        say(f"[yellow]{escape(rate.warning)}[/]")
    say(f"run folder {escape(str(run.path))}")


def report(run: RunFolder, learner: Learner, result: TrialResult, texts: tuple[str, str], rewards: list[float]) -> None:
    """Print the closing table of a run, and the commands that go on from here.

    Args:
        run: The run's folder.
        learner: What was trained.
        result: What it reached.
        texts: The measurements before and after.
        rewards: The mean training reward of each step.
    """
    names, tenth = learner.names, max(1, len(rewards) // 10)
    rows = Table("", Column("", overflow="fold"), show_header=False, title="result", title_justify="left")
    rows.add_row(f"{names.score} before", texts[0])
    rows.add_row(f"{names.score} after", texts[1], style="bold")
    if rewards:
        first, last = (sum(part) / len(part) for part in (rewards[:tenth], rewards[-tenth:]))
        rows.add_row(f"{names.reward}, first tenth → last", f"{first:.3f} → {last:.3f}")
    rows.add_row("learning rate", f"{learner.rate.value:.4g}")
    each = result.seconds / max(1, result.steps)
    rows.add_row("training time", f"{result.seconds:.0f} s, {result.steps:,} {names.step}s, {each:.3g} s each")
    Console().print(rows)
    say(f"run folder {escape(str(run.path))}")
    if result.status is Status.WORSE:
        doubt = f", or {learner.doubt()}" if learner.doubt() else ""
        say(
            f"[bold red]The policy got worse[/]: this learning rate is too large{doubt}, and no LR record was written. "
            "Try a quarter of it with --lr."
        )
        return
    for line in [f"learning curve: {run.path / CURVE}", *learner.remarks()]:
        say(escape(line))
    if not (run.path / FILE_NAME).exists():
        say(
            "[bold]Nothing was learnt[/] beyond the noise, and no LR record was written: a larger --lr or more steps "
            "may do it; python -m mua_rl.sweep finds the rate."
        )
        return
    say(f"the learning rate at other ranks: {escape(other_ranks(run.path))}")
    record = LRRecord.load(run.path)
    if names.is_command and record.rank is not None and gives_full_finetuning(record):
        settings = run.settings()
        say(f"full finetuning at this rate: {escape(full_finetuning(names.algorithm, settings, run.path))}")
        say(f"… from this policy: {escape(from_policy(names.algorithm, settings, run.path))}")


def say(text: str) -> None:
    """Print a line with markup; a terminal may break it, a file does not."""
    Console().print(text, highlight=False, soft_wrap=True)
