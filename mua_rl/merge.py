"""`python -m mua_rl.merge RUN FOLDER`: the policy that a run ended with as one model folder, its LoRA in the weights.

Of a run that started from a LoRA run, that one's is merged first, and so on down. The adapter of such a run fits the
merged policy of the run that it started from.
"""

import argparse
from pathlib import Path

from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.flags import FlagParser
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.base import load_base, load_tokenizer
from mua_rl.lm import models
from mua_rl.lr.record import LRRecord
from mua_rl.run.folder import RunFolder

LANGUAGE = ("grpo", "sft")
"""Algorithms whose policy is a causal language model."""


def merge(run: str, folder: Path, dtype: str = "float32", trust_remote_code: bool = False) -> None:
    """Write a run's policy and its tokenizer to a new folder, whole or not at all.

    Args:
        run: Folder of a run that has ended.
        folder: Where the model goes.
        dtype: Precision of the weights that are written; LoRAs are merged in fp32.
        trust_remote_code: Whether the base may bring code of its own.

    Raises:
        UserError: The run cannot be used, or its policy is no language model; or there is something in the folder, or
            it cannot be written.
    """
    algorithm = LRRecord.load(RunFolder.open(run).path).algorithm
    if algorithm not in LANGUAGE:
        raise UserError(f"{run} is a run of {algorithm}, not of a language model: its own script writes what it made.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not empty: choose another folder.")
    flags = ["--start_from", run, "--dtype", dtype, "--trust_remote_code", str(trust_remote_code)]
    arguments, _, _ = parse([*flags, "--task", "arithmetic"])  # any: a run of supervised finetuning has none
    tokenizer = load_tokenizer(arguments)
    model, _ = load_base(arguments, run)

    def write(made: Path) -> None:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)

    try:
        models.made_once(folder, write)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be written: {error.strerror}.") from None


def main() -> None:
    """The command line."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder of a finished run of mua_rl.grpo or scripts/finetune_text.py")
    parser.add_argument("folder", type=Path, help="new folder for the model")
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16"],
        default="float32",
        help="of the weights (default: float32; bfloat16 rounds away some of what was learnt)",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="let the base bring code of its own")
    args = parser.parse_args()
    merge(args.run, args.folder, args.dtype, args.trust_remote_code)
    print(f"the policy of {args.run}: {args.folder}")


if __name__ == "__main__":
    run_command(main)
