"""Whether a GRPO run can go on from a checkpoint: what transformers would stumble over is said before it loads one."""

import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.run import processes

_SHARDING = {"fsdp2": "FSDP2", "zero3": "ZeRO-3"}


def check_checkpoint(checkpoint: Path | None, arguments: GRPOArguments) -> None:
    """Refuse a checkpoint from which this run cannot go on.

    Args:
        checkpoint: The newest of the run; `None`: it has none, and begins anew.
        arguments: Of the run.

    Raises:
        UserError: It is of another kind, damaged, or without optimizer.
    """
    if checkpoint is None:
        return
    _check_layout(checkpoint)
    _check_whole(checkpoint)
    if arguments.save_only_model:
        raise UserError(
            f"{checkpoint} holds weights and no optimizer (--save_only_model), so that a run cannot go on from it: "
            "start anew, without the flag."
        )


def _check_layout(checkpoint: Path) -> None:
    """Refuse a checkpoint of another kind: what FSDP2 writes is for FSDP2, what ZeRO-3 writes for as many processes.

    Raises:
        UserError: It is.
    """
    marks = {"pytorch_model_fsdp.bin": "fsdp2", "latest": "zero3", "optimizer.pt": None}
    found = [way for mark, way in marks.items() if (checkpoint / mark).exists()]
    if not found:
        return
    (written, *_), now = found, processes.sharding()
    shares = len(list(checkpoint.glob("global_step*/*_optim_states.pt")))  # one of each process, by DeepSpeed
    if written == now and (now != "zero3" or shares == processes.launched()):
        return
    if written is None:
        assert now is not None
        name = _SHARDING[now]
        raise UserError(f"{checkpoint} was written without {name}: resume without it, on any number of processes.")
    number = f"--num_processes {shares}" if written == "zero3" else "any number of processes, also 1"
    raise UserError(
        f"{checkpoint} was written under {_SHARDING[written]}: resume with accelerate launch --config_file $(python -m "
        f"mua_rl.accelerate_configs {written}) and {number}."
    )


def _check_whole(checkpoint: Path) -> None:
    """Refuse a checkpoint with a damaged file, which transformers would stumble over.

    Raises:
        UserError: It has one.
    """
    for path in sorted(checkpoint.iterdir()):
        whole = path.suffix not in (".pt", ".pth") or zipfile.is_zipfile(path)  # torch.save writes zip archives
        if path.suffix == ".safetensors":
            try:
                safe_open(path, "pt")
            except (OSError, SafetensorError):
                whole = False
        if not whole:
            raise UserError(f"{path} is damaged: delete {checkpoint}, and --resume goes on from the one before.")
