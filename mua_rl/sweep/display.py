"""What a sweep shows while it runs."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from mua_rl.run.trial import Status, Trial, TrialResult
from mua_rl.sweep.study import Study


class Display:
    """A bar over the trials, and one line for each that has ended.

    Args:
        study: Whose trials are counted.
        console: Where to.
    """

    def __init__(self, study: Study, console: Console) -> None:
        self.study, self.console = study, console
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self.bar = self.progress.add_task("runs", total=None)

    def on_step(self, step: int, steps: int) -> None:
        """Show how far a group of trials is; in a log file, where there is no bar, now and then."""
        self.progress.update(self.bar, description=f"runs (step {step} of {steps})")
        if self.progress.disable and step % max(1, steps // 5) == 0:
            self.console.print(f"step {step} of {steps}", highlight=False)

    def on_outcome(self, trial: Trial, outcome: TrialResult) -> None:
        """Show a trial's outcome."""
        done, planned = self.study.counts()
        self.progress.update(self.bar, completed=done, total=planned, description="runs")
        name = trial.spec.label
        end = f"{outcome.before:.4g} → {outcome.score:.4g} ± {outcome.standard_error:.2g}"
        if outcome.status in (Status.DIVERGED, Status.STOPPED):
            end = f"{outcome.status}: {outcome.reason}"
        elif outcome.status is not Status.OK:
            end += f" ({outcome.status})"
        self.progress.console.print(
            f"{done:3d} of {planned}  {name}, 2^{trial.log2_lr:g}, seed {trial.seed}: {end}  ({outcome.seconds:.0f} s)",
            highlight=False,
            soft_wrap=True,
        )
