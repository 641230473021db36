"""`python -m mua_rl.grpo --rank 32`: GRPO with a verifiable reward, by LoRA at any rank or full finetuning.

Without flags it trains the embedded character-level model on the embedded arithmetic task, which takes a few minutes
on two CPU cores. The learning rate comes from an LR record; see `--lr_from`.
"""

import warnings

from mua_rl.exits import run_command


def main() -> None:
    """Run the command line."""
    from transformers.utils import logging as transformers_logging

    from mua_rl.grpo.arguments import parse
    from mua_rl.grpo.run import train
    from mua_rl.run.life import raise_if_worse

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)
    raise_if_worse(train(*parse()))


if __name__ == "__main__":
    run_command(main, after_interrupt="go on with --resume and the run folder")
