"""`python -m mua_rl.accelerate_configs NAME`: the path of a configuration, for `accelerate launch --config_file`."""

import sys

from mua_rl.accelerate_configs import config_file, names
from mua_rl.errors import UserError
from mua_rl.exits import run_command


def main() -> None:
    """The command line."""
    if len(sys.argv) != 2:
        raise UserError(f"give the name of a configuration: {', '.join(names())}.")
    print(config_file(sys.argv[1]))


if __name__ == "__main__":
    run_command(main)
