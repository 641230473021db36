"""How the policy of a GRPO run gets into its vLLM engine, for LoRA and for full finetuning.

TRL's own way, for comparison `--vllm_sync merged`, merges the adapter into the weights, pushes every weight and takes
the adapter out again at each sync: slow, and inexact wherever the engine's weights are bf16. Here the engine of a
LoRA run loads the base once and gets A and B alone.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from itertools import count
from typing import Any

import torch
from trl.generation.vllm_generation import VLLMGeneration

from mua_rl.adapter.targets import lora_layers, lora_matrices
from mua_rl.errors import EngineFailed, UserError, one_line
from mua_rl.rollouts.fsdp2 import reshard
from mua_rl.rollouts.lora_engine import (
    adapter_llm,
    check_layers,
    engine_rank,
    export_tensors,
    largest_rank,
    layer_suffixes,
)
from mua_rl.rollouts.seams_trl import SeamedEngine
from mua_rl.rollouts.seams_vllm import leave_uncompiled, load_weights
from mua_rl.rollouts.server import AdapterServer
from mua_rl.run import processes

ADAPTER, MERGED = "adapter", "merged"

_TEXT_OPTIONS = {"stop", "include_stop_str_in_output", "bad_words"}
"""Sampling options for which the engine needs the text."""


def generation_class(rank: int | None, sync: str) -> type[VLLMGeneration]:
    """The one place that decides how a policy is brought to its engine.

    Args:
        rank: `Adapter.rank`.
        sync: "adapter" (A and B alone; all weights in full finetuning), or "merged", TRL's own way for either.
    """
    if sync == MERGED:
        return MergedRollouts
    return FullRollouts if rank is None else AdapterRollouts


class _Rollouts(SeamedEngine):
    """What all ways have in common: the engine's precision, and failures that say what to do."""

    def sync_weights(self) -> None:
        """Bring the policy as it is now to the engine.

        Raises:
            EngineFailed: The engine is gone.
        """
        with engine_failures("while the policy was brought to it"):
            reshard(self.model)
            self._sync()

    def generate(self, *args: Any, **kwargs: Any) -> tuple:
        """Generate as TRL's engine does.

        Raises:
            EngineFailed: The engine is gone.
        """
        with engine_failures("while it generated"):
            return super().generate(*args, **kwargs)

    def _sync(self) -> None:
        super().sync_weights()

    def _engine_options(self) -> dict[str, Any]:
        """What our engine is made with besides TRL's options."""
        # Compiling costs a CPU run minutes and pays off only on a GPU.
        return {"dtype": compute_dtype(self), "enforce_eager": not torch.cuda.is_available()}

    def _new_llm(self, **options: Any) -> Any:
        from vllm import LLM

        return LLM(**options)

    def make_llm(self, **options: Any) -> Any:
        """See `SeamedEngine.make_llm`."""
        if not _TEXT_OPTIONS & self.generation_kwargs.keys():
            # TRL decodes the token ids itself; the engine's text, made token by token, is thrown away.
            self.generation_kwargs = {"detokenize": False, **self.generation_kwargs}
        if processes.is_main():
            print("mua_rl: starting the vLLM engine, which takes up to a minute", flush=True)
        with _base_folder(self) as folder, engine_start(options):
            llm = self._new_llm(**{**options, "model": folder, **self._engine_options()})
        leave_uncompiled(self.model)
        return llm


class MergedRollouts(_Rollouts):
    """TRL's own way: with LoRA, merge, push every weight one by one, unmerge."""


class FullRollouts(_Rollouts):
    """All weights at each sync, in one call: vLLM's loader indexes its parameters once and not once per weight."""

    def _sync(self) -> None:
        if self.mode != "colocate" or self.gathers_one_by_one:  # a loader may want to see several weights at once
            super()._sync()
            return
        if self.enable_sleep_mode:
            torch.accelerator.empty_cache()
            self.wake()
        load_weights(self.llm, self.weights())
        self.llm.reset_prefix_cache()


class AdapterRollouts(_Rollouts):
    """A and B alone at each sync; the engine's base is loaded once and never written to."""

    def _init_vllm(self) -> None:
        check_layers(self.model)
        self._versions = count(1)
        if self.mode == "server":
            self.lora_dtype = processes.on_main(self._connect)
        else:
            super()._init_vllm()

    def _connect(self) -> torch.dtype:
        url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
        self.vllm_client = AdapterServer(url, largest_rank(self.model), self.server_timeout)
        return self.vllm_client.lora_dtype

    def _engine_options(self) -> dict[str, Any]:
        lora = {"max_loras": 1, "lora_target_modules": layer_suffixes(self.model)}
        rank = engine_rank(largest_rank(self.model))
        return {**super()._engine_options(), "enable_lora": True, "max_lora_rank": rank, **lora}

    def _new_llm(self, **options: Any) -> Any:
        llm = adapter_llm(**options)
        self.lora_dtype = llm.llm_engine.vllm_config.lora_config.lora_dtype
        return llm

    def _sync(self) -> None:
        if self.mode == "colocate" and self.weights_sleep:
            self.wake()
        number = next(self._versions)
        name = f"mua_rl-{os.getpid()}-{number}"
        with self.gathered([matrix for _, layer in lora_layers(self.model) for matrix in lora_matrices(layer)]):
            tensors = export_tensors(self.model, self.lora_dtype)
        if self.mode == "colocate":
            llm: Any = self.llm
            llm.exchange(name, number, tensors)
        elif self.accelerator.is_main_process:
            server: Any = self.vllm_client
            server.exchange(name, tensors)


def compute_dtype(generation: VLLMGeneration) -> str:
    """The precision that the trainer computes in, so that the engine rounds as the trainer does."""
    precision = generation.accelerator.mixed_precision
    if precision in ("bf16", "fp16"):
        return {"bf16": "bfloat16", "fp16": "float16"}[precision]
    return str(next(generation.model.parameters()).dtype).removeprefix("torch.")


@contextlib.contextmanager
def _base_folder(generation: VLLMGeneration) -> Iterator[str]:
    """The folder (or hub id) of the trainer's base; a base that is on no disk is written out for the while.

    A model whose `name_or_path` is empty is none that can be loaded: `--start_from` merges a LoRA into it.
    """
    model = generation.model
    if model.name_or_path:
        yield model.name_or_path
        return
    with tempfile.TemporaryDirectory(prefix="mua_rl-base-") as folder:
        plain = getattr(model, "get_base_model", lambda: model)()
        weights = {
            name.replace(".base_layer", ""): weight
            for name, weight in plain.state_dict().items()
            if ".lora_" not in name
        }
        plain.save_pretrained(folder, state_dict=weights)
        generation.processing_class.save_pretrained(folder)
        yield folder


@contextlib.contextmanager
def engine_start(options: dict[str, Any]) -> Iterator[None]:
    """An engine that finds no room says what it was given and what to change.

    Raises:
        UserError: The engine cannot start.
    """
    try:
        yield
    except (ValueError, RuntimeError, torch.OutOfMemoryError) as error:
        share = options.get("gpu_memory_utilization")
        raise UserError(
            f"the vLLM engine cannot start with {share:.2f} of the memory ({one_line(error, 300)}): if "
            "other programs use this GPU, or its cache is too small, set --vllm_gpu_memory_utilization."
        ) from error


@contextlib.contextmanager
def engine_failures(when: str) -> Iterator[None]:
    """An engine that fails in mid-run is told apart from all else.

    Raises:
        EngineFailed: Something failed in the block that is not the user's fault.
    """
    try:
        yield
    except (UserError, EngineFailed, KeyboardInterrupt):
        raise
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}", 300)
        raise EngineFailed(f"the vLLM engine failed {when} ({reason})") from error
