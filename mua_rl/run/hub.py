"""`--push_to_hub`: refused at the start where it cannot work; a push that fails takes nothing of the run with it."""

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from httpx import HTTPError
from huggingface_hub import get_token, is_offline_mode
from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import GRPOConfig

from mua_rl.errors import UserError, one_line


def check(arguments: GRPOConfig) -> None:
    """Refuse to write to the hub where this environment rules it out.

    Raises:
        UserError: The hub is switched off, or there is no token for it.
    """
    flags = [name for name in ("push_to_hub", "log_completions_hub_repo") if getattr(arguments, name)]
    if not flags:
        return
    if is_offline_mode():
        raise UserError(f"--{flags[0]} cannot work while HF_HUB_OFFLINE is set: unset it, or drop the flag.")
    if get_token() is None:
        raise UserError(f"--{flags[0]} needs a token of the hub: hf auth login, or set HF_TOKEN, or drop the flag.")


@contextmanager
def reached() -> Iterator[None]:
    """One clear line where the hub is asked for something and says no, or is out of reach.

    Raises:
        UserError: It is so.
    """
    try:
        yield
    except (HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled) as error:
        raise UserError(
            f"the hub cannot be used ({one_line(error)}): see to it, or drop --push_to_hub and push the run by hf "
            "upload when it has ended."
        ) from error


def push(trainer: Trainer, folder: Path) -> None:
    """Push the folder of a run that has ended, all but its checkpoints.

    The weights are in it twice, byte for byte: at its root, where the hub looks for a model, and where `--start_from`
    does. The hub stores by content.

    Raises:
        UserError: It cannot be pushed; the folder is whole.
    """
    try:
        trainer.push_to_hub()
    except Exception as error:  # of the network, the hub, or its client: all is on the disk by now
        command = ["hf", "upload", str(trainer.hub_model_id), str(folder), "."]
        command += ["--exclude", f"{PREFIX_CHECKPOINT_DIR}-*"]
        if trainer.args.hub_revision:
            command += ["--revision", trainer.args.hub_revision]
        raise UserError(
            f"the run has ended and all of it is in {folder}, but it could not be pushed to the hub "
            f"({one_line(error)}); by hand: {shlex.join(command)}"
        ) from error
