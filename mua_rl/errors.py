"""The exceptions that commands turn into one clear line (`mua_rl.exits`)."""

import re


class UserError(ValueError):
    """Input that cannot be used. The message names the fault and the cure, in one sentence or two."""


class Unscored(UserError):
    """No step of a whole run could teach anything: no reward gave a score, for example."""


class Diverged(RuntimeError):
    """Training has left the finite numbers; the message says where."""


class CannotLearn(RuntimeError):
    """Training was stopped, since its steps taught nothing any more; the message says why, and the cure."""


class PolicyWorse(RuntimeError):
    """Training has ended, and the policy is worse than it was; the message says what may be done."""


class Terminated(RuntimeError):
    """The run was asked to end (SIGTERM); the message says what was saved and how to go on."""


class NoRate(RuntimeError):
    """A sweep has ended and found no learning rate; the message says why."""


class EngineFailed(RuntimeError):
    """The inference engine failed; the message says how."""


def without_password(text: str) -> str:
    """A text in which the passwords of URLs are hidden."""
    return re.sub(r"(://[^\s:/@]*:)[^\s@]+@", r"\1***@", text)


def one_line(error: object, most: int = 400) -> str:
    """What an error of another library says, on one line of at most `most` characters."""
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= most else f"{line[:most]} …"
