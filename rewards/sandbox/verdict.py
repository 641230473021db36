"""What is known of a program after its tests."""

from dataclasses import dataclass
from enum import Enum


class Reason(Enum):
    """Why a program passed or not; faults of the grader are `faults.GraderFault`, never a reason."""

    PASSED = "passed"
    WRONG = "wrong"  # a test's assertion failed, or the output differs
    ERROR = "error"  # the program raised, lacks its entry point, answered with what is no answer, or a script failed
    TIMEOUT = "timeout"
    MEMORY = "memory"
    KILLED = "killed"  # its process ended before its tests did: exit, signal, forbidden system call
    NOT_CARRIED = "not_carried"  # it was asked something that does not cross between the two processes
    CRASHED = "crashed"  # its tests' process, or its sandbox, ended twice, and not without it
    NO_CODE = "no_code"  # the completion holds no program


@dataclass(frozen=True)
class Verdict:
    """The outcome of one program on one row.

    Attributes:
        reason: `PASSED` if and only if every test ran and passed.
        passed, total: Tests passed, and in all. A run in all-or-nothing mode stops at the first failure.
        detail: One line for people, of the trusted side's making.
    """

    reason: Reason
    passed: int = 0
    total: int = 1
    detail: str = ""

    @property
    def ok(self) -> bool:
        return self.reason is Reason.PASSED

    @property
    def fraction(self) -> float:
        """Share of tests passed; 1 if and only if `ok`."""
        return 1.0 if self.ok else min(self.passed, self.total - 1) / max(1, self.total)
