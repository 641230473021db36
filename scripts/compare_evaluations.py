"""Compare two checkpoints that scripts/evaluate.py evaluated on the same problems, with a paired test.

python scripts/compare_evaluations.py evaluations/before evaluations/after
"""

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mua_rl.evaluation.evaluation import compare, load_evaluation
from mua_rl.exits import run_command


def main() -> None:
    """Compare and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path, help="folder of the evaluation to compare with")
    parser.add_argument("second", type=Path, help="folder of the evaluation that may be better")
    arguments = parser.parse_args()
    first, second = load_evaluation(arguments.first), load_evaluation(arguments.second)
    result = compare(first, second)
    table = Table("", "pass@1 [95% interval]", title=f"{first.settings['task']}, {len(first.problems)} problems")
    table.add_row(str(arguments.first), str(first.pass_at(1)))
    table.add_row(str(arguments.second), str(second.pass_at(1)))
    table.add_row("difference", str(result.difference))
    table.caption = (
        f"better on {result.better}, worse on {result.worse} problems; p = {result.p_value:.2g} ({result.test})"
    )
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
