"""On what a run runs: the machine, and the commit of this package."""

import os
import platform
import subprocess
from pathlib import Path

import torch


def machine(device: str | None = None) -> str:
    """The name of what computes, since seconds compare on one machine only: the GPU, else the processor and its cores.

    Args:
        device: The device, as PyTorch calls it. Default: the GPU where there is one.
    """
    if torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()}, {os.cpu_count()} cores"


def git_commit() -> str | None:
    """The commit that this package runs from, with "+changes" where files differ from it; `None` outside a checkout."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, check=True, timeout=10, encoding="utf-8"
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "-C", str(here), "status", "--porcelain", "-uno"], capture_output=True, timeout=10, encoding="utf-8"
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+changes" if changed else "")
