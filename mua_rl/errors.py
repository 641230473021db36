"""The exceptions that command lines turn into a single clear line: unusable input, and a run that diverged."""

import sys
from collections.abc import Callable


class UserError(ValueError):
    """Input that cannot be used. The message names the fault and the cure, in one sentence or two."""


class Diverged(RuntimeError):
    """Training has left the finite numbers; the message says where."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run `main`; print a `UserError` as one line on stderr and exit with code 2, a `Diverged` likewise with code 3."""
    try:
        main()
    except UserError as error:
        print(f"mua_rl: error: {error}", file=sys.stderr)
        sys.exit(2)
    except Diverged as error:
        print(f"mua_rl: the run diverged: {error}; try a quarter of the learning rate with --lr.", file=sys.stderr)
        sys.exit(3)
