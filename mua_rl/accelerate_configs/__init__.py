"""Ready configurations of `accelerate launch`, chosen by name: ddp, fsdp2, zero3.

accelerate launch --config_file $(python -m mua_rl.accelerate_configs ddp) --num_processes 2 -m mua_rl.grpo
"""

from pathlib import Path

from mua_rl.errors import UserError

FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The names to choose from."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def config_file(name: str) -> Path:
    """The file of a configuration.

    Raises:
        UserError: There is none of that name.
    """
    if name not in names():
        raise UserError(f"there is no configuration {name!r}: choose one of {', '.join(names())}.")
    return FOLDER / f"{name}.yaml"
