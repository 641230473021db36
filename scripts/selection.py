"""What `--only NAME=VALUE[,VALUE…]` of the reproductions chooses."""

from collections.abc import Mapping, Sequence

from mua_rl.errors import UserError


def passes(values: Mapping[str, str], only: Sequence[str]) -> bool:
    """Whether something with these values passes every filter `name=value[,value…]`.

    Raises:
        UserError: A filter is of something else.
    """
    for item in only:
        name, _, allowed = item.partition("=")
        if name not in values:
            raise UserError(f"--only takes {', '.join(values)} as in rank=4,full, not {item!r}.")
        if values[name] not in allowed.split(","):
            return False
    return True
