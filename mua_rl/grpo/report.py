"""What a GRPO run shows on the terminal: what it is about to do, and the closing table with what to do next."""

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from torch import nn

from mua_rl.lr.record import LRRecord
from mua_rl.lr.rules import Configuration
from mua_rl.lr.transfer import LearningRate, gives_full_finetuning
from mua_rl.run.commands import from_policy, full_finetuning, other_ranks
from mua_rl.run.folder import CURVE, RunFolder


def announce(
    run: RunFolder, task: str, base: str, policy: nn.Module, configuration: Configuration, rate: LearningRate
) -> None:
    """Some lines before the first step."""
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    _print(f"[bold]{task}[/] with {base}, {configuration}: {trained:,} trained weights")
    _print(f"learning rate [bold]{rate.value:.4g}[/]: {rate.reason}")
    if rate.warning:
        _print(f"[yellow]{rate.warning}[/]")
    _print(f"run folder {run.path}")


def report(run: RunFolder, rate: LearningRate) -> None:
    """The closing table, from what is in the run folder, and the commands that go on from here."""
    result, metrics = run.result(), run.metrics()
    assert result is not None
    rewards = [line["reward"] for line in metrics if isinstance(line.get("reward"), float)]
    tenth = max(1, len(rewards) // 10)
    rows = Table("", Column("", overflow="fold"), show_header=False, title="result", title_justify="left")
    rows.add_row("held-out accuracy before", f"{result['held_out/before']:.3f}")
    after = f"{result['held_out/after']:.3f} ± {result['held_out/standard_error']:.3f}"
    rows.add_row("held-out accuracy after", after, style="bold")
    rows.add_row("training reward, first tenth → last", f"{_mean(rewards[:tenth]):.3f} → {_mean(rewards[-tenth:]):.3f}")
    rows.add_row("learning rate", f"{rate.value:.4g}")
    rows.add_row("training time", f"{result['seconds']:.0f} s, {result['seconds_per_step']:.2f} s a step")
    rows.add_row("run folder", str(run.path))
    Console().print(rows)
    if result["diverged"]:
        _print("[bold red]The policy got worse[/]: this learning rate is too large, and no LR record was written.")
        _print("Try a quarter of it with --lr.")
        return
    _print(f"learning curve: {run.path / CURVE}")
    _print(f"the learning rate at other ranks: {escape(other_ranks(run.path))}")
    if gives_full_finetuning(LRRecord.load(run.path)):
        settings = run.settings()
        _print(f"full finetuning at this rate: {escape(full_finetuning('grpo', settings, run.path))}")
        _print(f"… from this policy: {escape(from_policy('grpo', settings, run.path))}")


def _print(text: str) -> None:
    Console().print(text, highlight=False, soft_wrap=True)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
