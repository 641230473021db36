"""How sandboxes are made, and what a program in one may use."""

from dataclasses import dataclass
from typing import Final

from mua_rl.errors import UserError

ISOLATION_LEVELS: Final = ("strong", "process")


@dataclass(frozen=True)
class Settings:
    """How programs are run.

    Attributes:
        isolation: "strong" (the default), or the weaker "process", which must be asked for; what each promises is in
            `mua_rl.rewards.code`.
        seconds: Wall-clock limit for a program and all of its tests; with standard input, for each test.
        total_seconds: With standard input, the limit for all tests of a program; the default is ten times `seconds`.
        memory_mb: Address space of the program's process, in MiB.
        threads: Threads that a program may have, itself among them.
        output_bytes: Most standard output that a program may write.
        modules: Third-party modules, such as "numpy", that programs and tests may import.
        workers: Pairs of sandboxes; the default is one for each core.
    """

    isolation: str = "strong"
    seconds: float = 4.0
    total_seconds: float = 0.0
    memory_mb: int = 512
    threads: int = 32
    output_bytes: int = 1 << 20
    modules: tuple[str, ...] = ()
    workers: int = 0

    def __post_init__(self) -> None:
        if self.isolation not in ISOLATION_LEVELS:
            raise UserError(f"isolation={self.isolation!r} is none of: {', '.join(ISOLATION_LEVELS)}.")
        for name, least in (("seconds", 0.01), ("memory_mb", 64), ("threads", 1), ("output_bytes", 1)):
            if not getattr(self, name) >= least:
                raise UserError(f"{name}={getattr(self, name)} is below {least}.")
        if not self.total_seconds:
            object.__setattr__(self, "total_seconds", 10 * self.seconds)
        if not self.total_seconds >= self.seconds:
            raise UserError(f"total_seconds={self.total_seconds} is below seconds={self.seconds}.")
        if self.workers < 0:
            raise UserError(f"workers={self.workers} is negative.")
