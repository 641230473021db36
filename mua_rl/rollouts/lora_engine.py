"""vLLM with one LoRA adapter that is exchanged between requests, and the ways by which it gets there.

An engine in this process is handed A and B as they are, on the GPU. A server reads them from a folder in a memory file
system. Either way each version has a name and a number of its own: vLLM's prefix cache tells adapters apart by name
alone, and an adapter that is loaded under an old number is not read again. `import mua_rl.rollouts.lora_engine` needs
no vLLM; only `adapter_llm` does.
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
from torch.distributed.tensor import DTensor

from mua_rl.adapter.targets import lora_layers, lora_matrices
from mua_rl.errors import UserError
from mua_rl.rollouts.seams_vllm import Handover

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
        f"vLLM takes LoRA up to rank {RANKS[-1]}, not {rank}: train with a smaller --rank or --vllm_sync merged, and "
        "evaluate with --engine transformers."
    )


def check_layers(model: nn.Module) -> None:
    """Refuse what vLLM has no LoRA for.

    Raises:
        UserError: A layer with LoRA is not linear, or LoRA has a bias or a magnitude (DoRA).
    """
    for name, layer in lora_layers(model):
        if not isinstance(layer.get_base_layer(), nn.Linear) or layer.use_dora.get("default"):
            raise UserError(
                f"vLLM has no LoRA for the layer {name}: use --vllm_sync merged, or other --target_modules."
            )


def largest_rank(model: nn.Module) -> int:
    """The largest rank of the layers that carry LoRA."""
    return max(int(layer.r["default"]) for _, layer in lora_layers(model))


def layer_suffixes(model: nn.Module) -> list[str]:
    """Last names of the layers that carry LoRA; vLLM leaves all others without LoRA's extra kernels."""
    return sorted({name.rpartition(".")[2] for name, _ in lora_layers(model)})


@torch.no_grad()
def export_tensors(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A and B of every layer, under PEFT's names, with the layer's multiplier inside B.

    The multiplier goes into the fp32 B before the one rounding to `dtype`, instead of after it as in vLLM. A and B
    themselves stay as they are. Where FSDP2 shards them, all processes must call this at once.

    Args:
        model: A model that carries LoRA.
        dtype: What the engine computes LoRA in.
    """
    named: dict[str, torch.Tensor] = {}
    for name, layer in lora_layers(model):
        a, b = lora_matrices(layer)
        named[f"{name}.lora_A.weight"] = _whole(a).to(dtype, copy=True)
        named[f"{name}.lora_B.weight"] = (_whole(b) * multiplier(layer)).to(dtype)
    return named


def _whole(matrix: torch.Tensor) -> torch.Tensor:
    """A matrix that FSDP2 has sharded, gathered from all processes."""
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


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
        return self._write(name, tensors, {key: tensor.cpu() for key, tensor in tensors.items()})

    def describe(self, name: str, tensors: dict[str, torch.Tensor]) -> Path:
        """Write a version without its matrices, for an engine that is handed them; as `publish` otherwise."""
        return self._write(name, tensors, {})

    def _write(self, name: str, tensors: dict[str, torch.Tensor], saved: dict[str, torch.Tensor]) -> Path:
        scratch, folder = self.root / f".{name}", self.root / name
        try:
            scratch.mkdir()
            if saved:
                save_file(saved, scratch / "adapter_model.safetensors")
            (scratch / "adapter_config.json").write_text(json.dumps(_peft_config(tensors)), encoding="utf-8")
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


def _peft_config(tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What vLLM wants to know of an adapter; it multiplies by `lora_alpha / r`, which is 1 here."""
    rank = max(len(tensor) for key, tensor in tensors.items() if key.endswith("lora_A.weight"))
    suffixes = sorted({key.split(".")[-3] for key in tensors})
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": suffixes, "bias": "none"}


def _sweep(where: Path) -> None:
    """Remove what runs left whose process is gone."""
    for folder in where.glob(f"{_PREFIX}*"):
        process = folder.name.removeprefix(_PREFIX).partition("-")[0]
        if process.isdigit() and not Path(f"/proc/{process}").exists() and Path("/proc/self").exists():
            shutil.rmtree(folder, ignore_errors=True)


def adapter_llm(**options: Any) -> Any:
    """vLLM's `LLM` in this process, made to answer with the adapter that `exchange` gave it last.

    Args:
        options: As `vllm.LLM` takes them.
    """
    from vllm import LLM
    from vllm.lora.request import LoRARequest

    class AdapterLLM(LLM):
        """`LLM` with an adapter."""

        adapter: LoRARequest | None = None

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.handover = Handover(self)
            self.folders = AdapterFolders()

        def exchange(self, name: str, number: int, tensors: dict[str, torch.Tensor]) -> None:
            """Take an adapter, under a name and a number that are new, in place of the one before."""
            if self.adapter is not None:
                self.drop(self.adapter)
                self.adapter = None
            adapter = self.take(name, number, tensors)
            self.reset_prefix_cache()
            self.adapter = adapter

        def take(self, name: str, number: int, tensors: dict[str, torch.Tensor]) -> LoRARequest:
            """Take an adapter beside those that are there."""
            adapter = LoRARequest(name, number, str(self.folders.describe(name, tensors)))
            self.handover.tensors[name] = tensors
            try:
                if not self.llm_engine.add_lora(adapter) or number not in self.llm_engine.list_loras():
                    raise RuntimeError(f"vLLM did not take the adapter {name}")
            finally:
                del self.handover.tensors[name]
            return adapter

        def drop(self, adapter: LoRARequest) -> None:
            """Let an adapter go."""
            self.llm_engine.remove_lora(adapter.lora_int_id)
            self.folders.drop(Path(adapter.lora_path))

        def generate(self, *args: Any, **kwargs: Any) -> Any:
            """Generate as `LLM` does, with the adapter where the call names none."""
            kwargs.setdefault("lora_request", self.adapter)
            return super().generate(*args, **kwargs)

        def sleep(self, level: int = 1, *args: Any, **kwargs: Any) -> Any:
            """Sleep as `LLM` does, but never at level 2, which throws away the base that nothing brings back."""
            return super().sleep(min(level, 1), *args, **kwargs)

    return AdapterLLM(**options)
