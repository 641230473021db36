"""`python -m mua_rl.sweep --algo grpo|ppo …`: find the best learning rate, at one rank or many; every flag of the
trainer is a flag of the sweep too.

Without flags it tunes LoRA of rank 32 on the embedded model and task, the learning rates side by side.
`--resume FOLDER` goes on with a sweep that was cut off, and helps with one that runs: any number of processes can share
a study.
"""

import os
import warnings

from rich.console import Console
from transformers.utils import logging

from mua_rl.exits import run_command
from mua_rl.sweep.arguments import parse
from mua_rl.sweep.run import sweep


def main() -> None:
    """Run the command line."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    request = parse()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    sweep(request, Console())


if __name__ == "__main__":
    run_command(main, after_interrupt="the same command goes on, or --resume with the folder")
