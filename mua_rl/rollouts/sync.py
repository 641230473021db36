"""How the policy of a GRPO run gets into its vLLM engine, for LoRA and for full finetuning.

TRL's own way, for comparison `--vllm_sync merged`, merges the adapter into the weights, pushes every weight and takes
the adapter out again at each sync: slow, and inexact wherever the engine's weights are bf16. Here the engine of a
LoRA run loads the base once and gets A and B alone.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import requests
import torch
from torch import nn
from trl.generation import vllm_generation
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration

from mua_rl.adapter.targets import lora_layers, lora_matrices
from mua_rl.errors import EngineFailed, UserError, one_line
from mua_rl.rollouts.fsdp2 import reshard
from mua_rl.rollouts.lora_engine import (
    AdapterFolders,
    adapter_llm,
    check_layers,
    engine_rank,
    export_tensors,
    largest_rank,
    layer_suffixes,
)
from mua_rl.rollouts.memory import Plan, PolicySize, plan, trainer_memory, usable
from mua_rl.run import processes

ADAPTER, MERGED = "adapter", "merged"

_TRL_UTILIZATION = 0.3
_SPARE_TOKENS = 32  # for a chat template's options, which the measuring of prompts does not know

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


def plan_engine(
    arguments: Any, policy: nn.Module, rank: int | None, prompt_tokens: int, is_longest: bool = True
) -> Plan | None:
    """Fill in what the arguments leave open about the engine, and refuse what cannot work, before anything is written.

    Args:
        arguments: `GRPOArguments`; `vllm_max_model_length` and `vllm_gpu_memory_utilization` are set where they are
            `None`, and the passes of a step where they are open, on a GPU as wide as it allows.
        policy: The model with its adapter attached.
        rank: `Adapter.rank`.
        prompt_tokens: Of the longest prompt.
        is_longest: Whether certainly none is longer, so that the engine need not take a longer one.

    Returns:
        The shares of the GPU; `None` where the user has set the engine's, or there is no GPU to share.

    Raises:
        UserError: vLLM has no such LoRA, or the GPU is too small.
    """
    if rank is not None and arguments.vllm_sync == ADAPTER:
        engine_rank(rank)
        check_layers(policy)
    elif not torch.accelerator.is_available():
        raise UserError(
            "vLLM on a CPU packs its weights as it loads them and takes no others later: only LoRA with --vllm_sync "
            "adapter works there. Drop --use_vllm."
        )
    longest = int(policy.config.get_text_config().max_position_embeddings)  # type: ignore[operator,union-attr]
    length = min(longest, prompt_tokens + arguments.max_completion_length)
    if arguments.vllm_max_model_length is None and is_longest:
        arguments.vllm_max_model_length = min(longest, length + _SPARE_TOKENS)
    colocated, given = arguments.vllm_mode == "colocate", arguments.vllm_gpu_memory_utilization
    if given is None and not (colocated and torch.cuda.is_available()):
        arguments.vllm_gpu_memory_utilization = _TRL_UTILIZATION
    if not torch.cuda.is_available():
        return None
    own, total = torch.cuda.mem_get_info()
    free = min(processes.gathered([own]))  # all processes take the same passes
    sequences = arguments.per_device_train_batch_size * arguments.steps_per_generation
    size = PolicySize.of(policy)
    work: dict[str, Any] = {
        "length": length,
        "compute_bytes": 2 if arguments.bf16 or arguments.fp16 else 4,
        "checkpointing": arguments.gradient_checkpointing,
        "processes": processes.count(),
        "sharded": processes.sharded(),
    }
    if given is not None or not colocated:
        room = usable(free) - (int(given * total) if colocated else 0)
        _widen(
            arguments,
            lambda completions: trainer_memory(size, micro_batch=completions, **work).total <= room,
        )
        return None

    def shares(completions: int) -> Plan:
        return plan(
            size,
            total=total,
            free=free,
            micro_batch=completions,
            sequences=sequences,
            longest=arguments.vllm_max_model_length or longest,
            sleeps=arguments.vllm_enable_sleep_mode,
            **work,
        )

    def roomy(completions: int) -> bool:
        try:
            return shares(completions).roomy
        except UserError:
            return False

    _widen(arguments, roomy)
    made = shares(arguments.per_device_train_batch_size)
    arguments.vllm_gpu_memory_utilization = made.utilization
    return made


def _widen(arguments: Any, fits: Callable[[int], bool]) -> None:
    """Take the widest passes that make the same step and fit: a small model does a wide one in a narrow one's time."""
    *wider, _ = arguments.wider_passes()
    for completions, passes in wider:
        if fits(completions):
            arguments.set_passes(completions, passes)
            return


class _Rollouts(VLLMGeneration):
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
        """As TRL's.

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

    def _make_llm(self, **options: Any) -> Any:
        from vllm import LLM

        return LLM(**options)

    def _init_vllm(self) -> None:
        if self.mode == "colocate" and not _TEXT_OPTIONS & self.generation_kwargs.keys():
            # TRL decodes the token ids itself; the engine's text, made token by token, is thrown away.
            self.generation_kwargs = {"detokenize": False, **self.generation_kwargs}

        def make(**options: Any) -> Any:
            if processes.is_main():
                print("mua_rl: starting the vLLM engine, which takes up to a minute", flush=True)
            with _base_folder(self) as folder, engine_start(options):
                return self._make_llm(**{**options, "model": folder, **self._engine_options()})

        with replaced(vllm_generation, "LLM", make):
            super()._init_vllm()
        leave_uncompiled(self.model)


class MergedRollouts(_Rollouts):
    """TRL's own way: with LoRA, merge, push every weight one by one, unmerge."""


class FullRollouts(_Rollouts):
    """All weights at each sync, in one call: vLLM's loader indexes its parameters once and not once per weight."""

    def _sync(self) -> None:
        if self.mode != "colocate" or self._dist.is_zero3:
            super()._sync()  # ZeRO-3's weights are whole one at a time, and a loader may want to see several
            return
        if self.enable_sleep_mode:
            vllm_generation.empty_cache()
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        model = self.llm.llm_engine.model_executor.driver_worker.model_runner.model
        model.load_weights(self._iter_named_params())
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
        self.vllm_client = _AdapterServer(self)
        return self.vllm_client.lora_dtype

    def _engine_options(self) -> dict[str, Any]:
        lora = {"max_loras": 1, "lora_target_modules": layer_suffixes(self.model)}
        rank = engine_rank(largest_rank(self.model))
        return {**super()._engine_options(), "enable_lora": True, "max_lora_rank": rank, **lora}

    def _make_llm(self, **options: Any) -> Any:
        llm = adapter_llm(**options)
        self.lora_dtype = llm.llm_engine.vllm_config.lora_config.lora_dtype
        return llm

    def _sync(self) -> None:
        if self.mode == "colocate" and self._llm_weights_sleeping:
            self.llm.wake_up(tags=["weights"])
            self._llm_weights_sleeping = False
        number = next(self._versions)
        name = f"mua_rl-{os.getpid()}-{number}"
        matrices = [matrix for _, layer in lora_layers(self.model) for matrix in lora_matrices(layer)]
        with self._dist.gather_params(matrices):  # DeepSpeed's; FSDP2's are gathered one by one
            tensors = export_tensors(self.model, self.lora_dtype)
        if self.mode == "colocate":
            llm: Any = self.llm
            llm.exchange(name, number, tensors)
        elif self.accelerator.is_main_process:
            server: Any = self.vllm_client
            server.exchange(name, tensors)


class _AdapterServer(VLLMClient):
    """A `vllm serve` on this machine that reads A and B from the memory file system.

    A server that was restarted is waited for, for as long as a first one is, and given the adapter again.
    """

    LOAD_SECONDS = 120
    START = (
        "VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora "
        "--max-lora-rank {rank} --logprobs-mode processed_logprobs --max-logprobs -1"
    )

    def __init__(self, generation: AdapterRollouts) -> None:
        self.start = self.START.format(rank=engine_rank(largest_rank(generation.model)))
        url = generation.server_base_url or f"http://{generation.server_host}:{generation.server_port}"
        try:
            super().__init__(base_url=url, connection_timeout=generation.server_timeout)
        except requests.exceptions.ConnectionError as error:
            raise UserError(f"{error} For a LoRA run: {self.start}") from None
        lora: dict[str, Any] = self.get_server_info().get("lora_config") or {"max_lora_rank": 0}
        rank = int(lora["max_lora_rank"])
        if rank < largest_rank(generation.model):
            raise UserError(f"the vLLM server at {url} takes LoRA up to rank {rank}: start it as {self.start}")
        self.lora_dtype = getattr(torch, str(lora["lora_dtype"]).removeprefix("torch."))
        self.patience = generation.server_timeout
        self.folders = AdapterFolders()
        self.adapter: Path | None = None

    def exchange(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """Load an adapter under a new name, ask for it from now on, and drop the one before."""
        folder = self.folders.publish(name, tensors)
        try:
            self._load(folder)
        except requests.exceptions.ConnectionError:
            self._wait()
            self._load(folder)
        before, self.adapter, self.model = self.adapter, folder, name
        if before is not None:
            self.session.post(f"{self.base_url}/v1/unload_lora_adapter", json={"lora_name": before.name})
            self.folders.drop(before)
        self.reset_prefix_cache()

    def generate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """As TRL's; once more where the server was restarted meanwhile and so has lost the adapter."""
        try:
            return super().generate(*args, **kwargs)
        except Exception:
            self._wait()
            if self.adapter is None or self.model in self._served():
                raise
            self._load(self.adapter)
            return super().generate(*args, **kwargs)

    def _wait(self) -> None:
        print(f"mua_rl: the vLLM server at {self.base_url} does not answer; waiting for it", file=sys.stderr)
        self.check_server(self.patience)

    def _served(self) -> list[str]:
        return [model["id"] for model in self._get(f"{self.base_url}/v1/models")["data"]]

    def _load(self, folder: Path) -> None:
        loading = {"lora_name": folder.name, "lora_path": str(folder)}
        # Not by the session, which would repeat a refusal for half a minute.
        answer = requests.post(f"{self.base_url}/v1/load_lora_adapter", json=loading, timeout=self.LOAD_SECONDS)
        if answer.status_code != 200:
            reason = one_line(answer.text, 200)
            raise UserError(f"the vLLM server did not take the adapter ({reason}): start it as {self.start}")


def leave_uncompiled(model: nn.Module) -> None:
    """Call a model's layers as they are although a vLLM engine in this process has changed their classes.

    An architecture that vLLM has no code for (OLMo-2) runs on that of transformers, whose class vLLM makes into one
    that compiles: other models of the class then lack the attribute by which its own say whether to.
    """
    for kind in {type(module) for module in model.modules()}:
        if kind.__call__.__module__.startswith("vllm.") and not hasattr(kind, "do_not_compile"):
            kind.do_not_compile = True  # type: ignore[attr-defined]  # the engine's own have one of their own


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
def replaced(owner: object, name: str, value: Any) -> Iterator[None]:
    """Within the block, `owner.name` is `value`: TRL makes its engine by name and takes none that is made already.

    Raises:
        AttributeError: The owner has no such name any more (TRL has moved the seam).
    """
    with mock.patch.object(owner, name, value):
        yield


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
