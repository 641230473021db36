"""vLLM with one LoRA adapter that is exchanged between requests, and the folders through which it gets there.

vLLM reads adapters from folders. Each version is written to a memory file system under a name and a number of its
own: vLLM's prefix cache tells adapters apart by name alone, and an adapter that is loaded under an old number is not
read again. `import mua_rl.vllm_lora` needs no vLLM; only `adapter_llm` does.
"""

import json
import os
import shutil
import tempfile
import weakref
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from torch import nn

from mua_rl.adapter import lora_layers, lora_matrices
from mua_rl.errors import UserError

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks that vLLM offers for an engine (`vllm.config.lora.MaxLoRARanks`)."""

_PREFIX = "mua_rl-adapter-"


def engine_rank(rank: int) -> int:
    """The smallest of vLLM's ranks that holds `rank`: kernels compute the padding, so more is only slower.

    Raises:
        UserError: vLLM offers none.
    """
    for offered in RANKS:
        if rank <= offered:
            return offered
    raise UserError(
        f"vLLM takes LoRA up to rank {RANKS[-1]}, not {rank}: choose a smaller --rank, or --vllm_sync merged."
    )


def check_layers(model: nn.Module) -> None:
    """Refuse what vLLM has no LoRA for.

    Raises:
        UserError: A layer with LoRA is not linear, or LoRA has a bias or a magnitude (DoRA).
    """
    for name, layer in lora_layers(model):
        if not isinstance(layer.get_base_layer(), nn.Linear) or layer.use_dora.get("default"):
            raise UserError(
                f"vLLM has no LoRA for the layer {name}: use --vllm_sync merged, or other --target-modules."
            )


def largest_rank(model: nn.Module) -> int:
    """The largest rank of the layers that carry LoRA."""
    return max(int(layer.r["default"]) for _, layer in lora_layers(model))


def layer_suffixes(model: nn.Module) -> list[str]:
    """Last names of the layers that carry LoRA; vLLM leaves all others without LoRA's extra kernels."""
    return sorted({name.rpartition(".")[2] for name, _ in lora_layers(model)})


@torch.no_grad()
def export_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A and B of every layer on the CPU, under PEFT's names, with the layer's multiplier inside B.

    The multiplier goes into the fp32 B before the one rounding to `dtype`, instead of after it as in vLLM. A and B
    themselves stay as they are. One copy from the device for all of them.

    Args:
        model: A model that carries LoRA.
        dtype: What the engine computes LoRA in.
    """
    named: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model):
        a, b = lora_matrices(layer)
        named[f"{name}.lora_A.weight"] = a
        named[f"{name}.lora_B.weight"] = b * multiplier(layer)
    flat = torch.cat([tensor.detach().to(dtype).flatten() for tensor in named.values()]).cpu()
    pieces = flat.split([tensor.numel() for tensor in named.values()])
    return {name: piece.view(tensor.shape) for (name, tensor), piece in zip(named.items(), pieces, strict=True)}


def multiplier(layer: LoraLayer) -> float:
    """PEFT's multiplier of a layer: `lora_alpha / r`, or whatever it was set to."""
    return float(layer.scaling["default"])


class AdapterFolders:
    """Folders of adapter versions in memory, each complete from the moment it is there.

    Args:
        parent: Where to make them. Default: `/dev/shm` where there is one, else the folder for temporary files.

    The folders go when this object does. Those of runs that were killed go when the next run starts.
    """

    def __init__(self, parent: Path | str | None = None) -> None:
        where = Path(parent or ("/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()))
        _sweep(where)
        self.root = Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-", dir=where))
        self._end = weakref.finalize(self, shutil.rmtree, self.root, ignore_errors=True)

    def publish(self, name: str, tensors: dict[str, torch.Tensor]) -> Path:
        """Write a version and return its folder.

        Args:
            name: A name that no version had before.
            tensors: A and B under PEFT's names, the multiplier inside B.

        Raises:
            UserError: No room is left in memory.
        """
        scratch, folder = self.root / f".{name}", self.root / name
        ranks = [len(tensor) for key, tensor in tensors.items() if key.endswith("lora_A.weight")]
        suffixes = sorted({key.split(".")[-3] for key in tensors})
        # vLLM multiplies by lora_alpha / r, which is 1 here.
        config = {"peft_type": "LORA", "r": max(ranks), "lora_alpha": max(ranks), "target_modules": suffixes}
        try:
            scratch.mkdir()
            save_file(tensors, scratch / "adapter_model.safetensors")
            (scratch / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
            scratch.rename(folder)
        except OSError as error:
            raise UserError(f"the adapter cannot be written to {self.root}: {error.strerror}.") from error
        return folder

    def drop(self, folder: Path) -> None:
        """Remove a version."""
        shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Remove all versions."""
        self._end()


def _sweep(where: Path) -> None:
    """Remove what runs left whose process is gone."""
    for folder in where.glob(f"{_PREFIX}*"):
        process = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def adapter_llm(**options: Any) -> Any:
    """vLLM's `LLM`, made to answer with the adapter that `exchange` gave it last.

    Args:
        options: As `vllm.LLM` takes them.
    """
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    class AdapterLLM(LLM):
        """`LLM` with an adapter."""

        adapter: LoRARequest | None = None

        def exchange(self, name: str, number: int, folder: Path) -> None:
            """Load an adapter, under a name and a number that are new, in place of the one before."""
            if self.adapter is not None:
                self.llm_engine.remove_lora(self.adapter.lora_int_id)
                self.adapter = None
            adapter = LoRARequest(name, number, str(folder))
            if not self.llm_engine.add_lora(adapter) or number not in self.llm_engine.list_loras():
                raise RuntimeError(f"vLLM did not take the adapter {name}")
            self.reset_prefix_cache()
            self.adapter = adapter

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            """As `LLM.generate`, with the adapter where the call names none."""
            kwargs.setdefault("lora_request", self.adapter)
            return super().generate(*args, **kwargs)

        def sleep(self, level: int = 1, *args: Any, **kwargs: Any) -> Any:
            """As `LLM.sleep`, but never at level 2, which throws away the base that nothing brings back."""
            return super().sleep(min(level, 1), *args, **kwargs)

    return AdapterLLM(**options)
