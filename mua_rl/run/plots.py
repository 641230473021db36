"""The learning curve of a run."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def learning_curve(metrics: list[dict[str, Any]], path: Path, title: str, curves: dict[str, str], x: str) -> None:
    """Draw metrics against steps.

    Args:
        metrics: The lines of a run's metrics, each with a `step`.
        path: The PNG file.
        title: The title above the axes.
        curves: The label of each metric, by its key. Metrics with few points are drawn with markers.
        x: The label of the x axis.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")  # no pyplot: safe in any thread, without a display
    axes = figure.add_subplot()
    for key, label in curves.items():
        points = [(line["step"], line[key]) for line in metrics if isinstance(line.get(key), (int, float))]
        if points:
            sparse = len(points) < len(metrics) / 3
            axes.plot(
                *zip(*points, strict=True), label=label, marker="o" if sparse else None, alpha=1 if sparse else 0.6
            )
    axes.set(title=title, xlabel=x)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
