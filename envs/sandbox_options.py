"""How a code task's programs are run, as options behind its path: `mbpp:PATH,seconds=10,modules=numpy+scipy`."""

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from typing import Any, Final

from mua_rl.errors import UserError
from mua_rl.rewards.sandbox.settings import Settings

_OPTIONS: Final[dict[str, Callable[[str], Any]]] = {
    "modules": lambda text: tuple(text.split("+")),
    "seconds": float,
    "total_seconds": float,
    "memory_mb": int,
    "threads": int,
}
_OPTION: Final = re.compile(rf"({'|'.join(_OPTIONS)})=([^,]*)")


def split_options(argument: str | None) -> tuple[str | None, str]:
    """The path (or `None`) in what follows the colon of a task spec, and the options behind it, as they stand there."""
    parts = (argument or "").split(",")
    count = 0
    while count < len(parts) and _OPTION.fullmatch(parts[-1 - count]):
        count += 1
    path = ",".join(parts[: len(parts) - count])
    return path or None, ",".join(parts[len(parts) - count :])


def sandbox_settings(argument: str | None, defaults: Settings) -> tuple[str | None, Settings]:
    """The path in a code task's argument, and its settings.

    Options (`mua_rl.rewards.sandbox.settings.Settings` says what they mean): `modules` (joined by +), `seconds`,
    `total_seconds`, `memory_mb`, `threads`.

    Raises:
        UserError: An option's value makes no sense, or a module is not installed.
    """
    path, options = split_options(argument)
    values: dict[str, Any] = {}
    for name, text in _OPTION.findall(options):
        try:
            values[name] = _OPTIONS[name](text)
        except ValueError:
            raise UserError(f"the task option {name}={text} is not a number.") from None
    if "seconds" in values:  # the limit for all tests follows that for one
        values = {"total_seconds": 0.0} | values
    for module in values.get("modules", ()):
        if not module.isidentifier() or importlib.util.find_spec(module) is None:
            raise UserError(f"the task option modules names {module!r}, which is not installed here.")
    return path, dataclasses.replace(defaults, **values)
