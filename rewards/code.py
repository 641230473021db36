"""The code reward: run the program in a completion against its row's tests, in a sandbox.

The process that runs the program never holds the tests, compares, decides or reports. The tests run unchanged in a
second process, against mirrors of what the program defines; only plain data crosses (`sandbox/wire.py`). A program
passes if every test ran there and passed; all else is 0, with a reason. What each reason means, which shapes of Python
are carried and which rows are refused is in docs/verdicts.md.

Isolation levels (Linux 5.8 or later, x86_64 or aarch64):

- `"strong"`, the default, for root and, where user namespaces are allowed, for ordinary users. Own user, pid, mount,
  network, ipc and uts namespaces; a read-only root that holds the standard library alone; no capabilities; resource
  limits; a seccomp allow list without processes, programs, sockets or writing. Root also gives each sandbox a user id
  that nothing else has. It is tested at start, and refused, with the cure, where it does not hold.
- `"process"`, weaker, by that name only: for containers that forbid namespaces. The same two processes, limits and
  seccomp filter (so no network, writing, child processes or signals), but no namespaces and no root of its own: what
  may be read is left to Landlock, and where the kernel lacks that (before 5.13, or switched off; a warning says so)
  programs can read whatever the account can: as root, which gives them an id of their own here too, what is open to
  everybody; as an ordinary user, all of the user's files and the trainer's memory, with the tests in it. Where root's
  interpreter is closed to that id (under /root), and Landlock is there, programs keep root's right to read.

Neither holds against a fault of the kernel or the CPU. Memory is bounded by workers times
(`memory_mb` + 1 GiB for the tests' process).
"""

import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from mua_rl.rewards.completions import required_column
from mua_rl.rewards.extract_code import extract_code
from mua_rl.rewards.faults import BadRow
from mua_rl.rewards.sandbox.pool import Pool
from mua_rl.rewards.sandbox.row import Row, parse_row
from mua_rl.rewards.sandbox.settings import Settings
from mua_rl.rewards.sandbox.verdict import Reason, Verdict

_log = logging.getLogger(__name__)

_pools: dict[tuple[int, Settings], Pool] = {}
_pools_lock = threading.Lock()


def shared_pool(settings: Settings | None = None) -> Pool:
    """This process's pool with these settings, started on first use, closed at exit.

    Raises:
        UserError: The isolation asked for cannot be had here.
    """
    key = (os.getpid(), settings or Settings())  # a forked process must not talk over its parent's sockets
    with _pools_lock:
        if key not in _pools:
            _pools[key] = Pool(key[1])
        return _pools[key]


def grade_code(
    completions: Sequence[Any],
    rows: Sequence[Row],
    *,
    settings: Settings | None = None,
    fraction: bool = False,
) -> list[Verdict | BadRow]:
    """A verdict on each completion against the row beside it, or the row's fault.

    Raises:
        UserError: The isolation asked for cannot be had here.
        GraderFault: The sandbox failed; no verdict is made up.
    """
    sources = [
        extract_code(completion, row.prelude, row.entry_point, row.tests if row.kind == "code" else ())
        for completion, row in zip(completions, rows, strict=True)
    ]
    jobs = [(source, row) for source, row in zip(sources, rows, strict=True) if source is not None]
    graded = iter(shared_pool(settings).grade(jobs, fraction) if jobs else [])
    return [Verdict(Reason.NO_CODE) if source is None else next(graded) for source in sources]


def faulty_rows(rows: Sequence[Row], references: Sequence[str], *, settings: Settings | None = None) -> dict[int, str]:
    """Which rows are not fit for training, by index, and why: their tests cannot be run, or their own solution fails.

    Args:
        rows: Rows of a dataset.
        references: A solution of each.
        settings: Of the sandbox.
    """
    verdicts = shared_pool(settings).grade(list(zip(references, rows, strict=True)))
    return {
        i: str(v) if isinstance(v, BadRow) else f"its own solution fails: {v.reason.value}, {v.detail}"
        for i, v in enumerate(verdicts)
        if isinstance(v, BadRow) or not v.ok
    }


class CodeReward:
    """A reward in TRL's form, of the tests in the dataset's columns.

    Columns (`row.parse_row` has their forms): `tests`, or MBPP's `test_list`; `entry_point`, `prelude` and `setup`
    where a row needs them.

    Args:
        settings: Of the sandbox; the defaults are the strong level and 4 seconds.
        fraction: Give the fraction of tests passed instead of all or nothing.
        on_bad_row: "skip" (None as the reward, which TRL leaves out, and a warning once a row) or "raise".

    Raises (when called):
        UserError: There is no column of tests, or the isolation asked for cannot be had here.
        BadRow: With `on_bad_row="raise"`.
        GraderFault: The sandbox failed.
    """

    def __init__(self, settings: Settings | None = None, *, fraction: bool = False, on_bad_row: str = "skip") -> None:
        self.settings = settings
        self.fraction = fraction
        self.on_bad_row = on_bad_row
        self.__name__ = "code_fraction_reward" if fraction else "code_reward"
        self._warned: set[str] = set()

    def __call__(
        self,
        prompts: Sequence[Any] | None = None,
        completions: Sequence[Any] = (),
        tests: Sequence[Any] | None = None,
        entry_point: Sequence[Any] | None = None,
        prelude: Sequence[Any] | None = None,
        setup: Sequence[Any] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """One reward for each completion, in [0, 1]; metrics `code/timeout` and so on are shares of the batch."""
        n = len(completions)
        # MBPP's own name for the column, and its imports beside it.
        tests = required_column(
            self.__name__, "tests", columns.get("test_list") if tests is None else tests, columns, completions
        )
        cells = zip(tests, entry_point or [None] * n, prelude or [None] * n, setup or [None] * n, strict=True)
        rows = [self._parse(*cell) for cell in cells]
        good = [i for i, row in enumerate(rows) if isinstance(row, Row)]
        verdicts: list[Verdict | BadRow] = [row if isinstance(row, BadRow) else BadRow() for row in rows]
        graded = grade_code(
            [completions[i] for i in good],
            [row for row in rows if isinstance(row, Row)],
            settings=self.settings,
            fraction=self.fraction,
        )
        for i, verdict in zip(good, graded, strict=True):
            verdicts[i] = verdict
            if isinstance(verdict, BadRow):
                self._report_bad_row(verdict, tests[i])
        if log_metric is not None and n:
            for name, share in reason_shares(verdicts).items():
                log_metric(f"code/{name}", share)
        return [None if isinstance(v, BadRow) else v.fraction if self.fraction else float(v.ok) for v in verdicts]

    def _parse(self, tests: Any, entry_point: Any, prelude: Any, setup: Any) -> Row | BadRow:
        try:
            return parse_row(tests, entry_point, prelude, setup)
        except BadRow as error:
            self._report_bad_row(error, tests)
            return error

    def _report_bad_row(self, error: BadRow, tests: Any) -> None:
        if self.on_bad_row == "raise":
            raise error
        key = repr(tests)[:200]
        if key not in self._warned:
            self._warned.add(key)
            _log.warning("a row's tests cannot be run (%s); its completions get no reward. Tests: %s", error, key)


def reason_shares(verdicts: Sequence[Verdict | BadRow]) -> dict[str, float]:
    """Share of each reason, `grader_fault` for bad rows among them: what to watch for reward hacking."""
    counts = Counter("grader_fault" if isinstance(v, BadRow) else v.reason.value for v in verdicts)
    names = [reason.value for reason in Reason] + ["grader_fault"]
    return {name: counts[name] / max(1, len(verdicts)) for name in names}


code_reward = CodeReward()
"""All or nothing, at the strong level, with the default limits."""

code_fraction_reward = CodeReward(fraction=True)
"""The fraction of tests passed, at the strong level, with the default limits."""
