"""The command line of a command that is no trainer."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any


class FlagParser(argparse.ArgumentParser):
    """A parser whose flags are spelt with underscores, as the trainers' are, and taken with dashes as well."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        """As argparse's."""
        return super().parse_known_args(
            [_underscored(arg) for arg in (sys.argv[1:] if args is None else args)], namespace
        )


def _underscored(argument: str) -> str:
    """An argument with the dashes of its flag, if it is one, turned into underscores."""
    if not argument.startswith("--"):
        return argument
    flag, equals, value = argument[2:].partition("=")
    return f"--{flag.replace('-', '_')}{equals}{value}"
