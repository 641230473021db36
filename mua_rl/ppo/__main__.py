"""`python -m mua_rl.ppo --rank 8`: adapt a pretrained control policy by PPO, with LoRA at any rank or fully.

Without flags it adapts the shipped CartPole policy to a pole three times as long, which takes seconds. The learning
rate comes from an LR record; see `--lr_from`.
"""

import warnings
from importlib.util import find_spec

from mua_rl.errors import UserError
from mua_rl.exits import run_command


def main() -> None:
    """Run the command line."""
    if find_spec("stable_baselines3") is None:
        raise UserError("PPO needs stable-baselines3 and gymnasium: pip install 'mua-rl[control]'.")
    from mua_rl.ppo.arguments import limit_threads, parse
    from mua_rl.ppo.run import train
    from mua_rl.run.life import raise_if_worse

    warnings.filterwarnings("ignore", category=FutureWarning)
    limit_threads()
    raise_if_worse(train(*parse()))


if __name__ == "__main__":
    run_command(main, after_interrupt="go on with --resume and the run folder")
