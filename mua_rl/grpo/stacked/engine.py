"""Completions of all trials from one vLLM engine in this process, each prompt with its trial's LoRA.

The engine loads the base once and is handed A and B of all trials whenever it shall answer. An engine takes up to a
minute to start, so it is kept for the next trials with the same base.
"""

import gc
import os
import tempfile
from collections.abc import Sequence
from itertools import count
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mua_rl.grpo.setup import free_port
from mua_rl.grpo.stacked.generation import Completions, Sampling
from mua_rl.grpo.stacked.memory import StepShape
from mua_rl.grpo.stacked.stack import LoRAStack
from mua_rl.rollouts.lora_engine import adapter_llm, engine_rank
from mua_rl.rollouts.memory import PolicySize, plan
from mua_rl.rollouts.sync import engine_failures, engine_start, leave_uncompiled

_LORAS = 8  # an engine has room for a multiple of it, so that it serves fewer trials that come later too
_SEQUENCES = 512  # the most at once: vLLM captures CUDA graphs for no more
_BATCH_TOKENS = 4096  # as TRL sets it: vLLM takes more memory for more
_CPU_SHARE = 0.3  # vLLM asks for a share of the GPU on a CPU too


class StackedEngine:
    """An engine with the LoRAs of K trials.

    Args:
        options: What it is made for: vLLM's options that depend on the trials.
        folder: The folder, or hub id, of the base.
        share: The engine's share of the GPU's memory.

    Raises:
        UserError: It cannot start.
    """

    def __init__(self, options: dict[str, Any], folder: str, share: float) -> None:
        launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        launch |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        print("mua_rl: starting the vLLM engine, which takes up to a minute", flush=True)
        options = {**options, "gpu_memory_utilization": share}
        with engine_start(options), mock.patch.dict(os.environ, launch):  # not for the runs that are started from here
            self.llm = adapter_llm(
                **options,
                model=folder,
                enable_lora=True,
                max_num_batched_tokens=max(_BATCH_TOKENS, options["max_model_len"]),
                distributed_executor_backend="external_launcher",
                logprobs_mode="processed_logprobs",
                enforce_eager=not torch.cuda.is_available(),  # compiling costs a CPU run minutes
            )
        self.lora_dtype = self.llm.llm_engine.vllm_config.lora_config.lora_dtype
        self.adapters: list[Any] = []
        self._versions = count(1)

    def sync(self, stack: LoRAStack) -> torch.Tensor:
        """Take the trials as they are now in place of all that the engine has.

        A trial with values that are not finite is taken as the base: none of its numbers shall be in the engine's
        cache.

        Returns:
            `(K,)`, whether the trial's values are finite.
        """
        finite = stack.values.isfinite().all(-1)
        for adapter in self.adapters:
            self.llm.drop(adapter)
        self.adapters = []
        for row, trial in enumerate(stack.active):
            number = next(self._versions)
            # α goes into the fp32 B before the one rounding, as in `mua_rl.rollouts.lora_engine.export_tensors`.
            tensors = stack.peft_tensors(trial, self.lora_dtype, stack.alpha(trial))
            if not finite[row]:
                tensors = {name: torch.zeros_like(matrix) for name, matrix in tensors.items()}
            self.adapters.append(self.llm.take(f"mua_rl-{os.getpid()}-{trial}-{number}", number, tensors))
        self.llm.reset_prefix_cache()
        return finite

    def complete(
        self,
        stack: LoRAStack,
        sampling: Sampling,
        prompts: list[list[list[int]]],
        copies: int,
        generators: Sequence[torch.Generator] | None,
    ) -> Completions:
        """Complete prompts with the trials as they are now; see `Decoder.complete`.

        Raises:
            EngineFailed: The engine is gone.
        """
        from vllm import SamplingParams

        with engine_failures("while the trials were brought to it"):
            finite = self.sync(stack)
        requests, parameters, adapters = [], [], []
        for k, trial in enumerate(prompts):
            seeds = [None] * len(trial)
            if generators is not None:
                seeds = torch.randint(2**62, (len(trial),), generator=generators[k]).tolist()
            for ids, seed in zip(trial, seeds, strict=True):
                requests.append({"prompt_token_ids": ids})
                adapters.append(self.adapters[k])
                parameters.append(
                    SamplingParams(
                        n=copies,
                        temperature=0.0 if seed is None else sampling.temperature,
                        seed=seed,
                        max_tokens=sampling.new_tokens,
                        stop_token_ids=sampling.end_ids,
                        ignore_eos=True,  # it is among the tokens above
                        detokenize=False,
                        logprobs=0,
                    )
                )
        with engine_failures("while it generated"):
            outputs = self.llm.generate(requests, sampling_params=parameters, lora_request=adapters, use_tqdm=False)
        answers = [completion for output in outputs for completion in output.outputs]
        tokens = torch.full((len(answers), sampling.new_tokens), sampling.pad_id)
        logps = torch.full(tokens.shape, torch.nan)
        for row, answer in enumerate(answers):
            ids = list(answer.token_ids)
            tokens[row, : len(ids)] = torch.tensor(ids)
            steps = zip(ids, answer.logprobs, strict=True)
            logps[row, : len(ids)] = torch.tensor([step[token].logprob for token, step in steps])
        lengths = torch.tensor([len(answer.token_ids) for answer in answers])
        tokens, lengths, logps = (values.unflatten(0, (len(prompts), -1)) for values in (tokens, lengths, logps))
        return Completions(tokens, lengths, finite.cpu(), logps)

    def close(self) -> None:
        """Give the memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        self.llm.folders.close()
        del self.llm


_running: dict[tuple[str, str], StackedEngine] = {}
"""The engine of this process, one at most, by its base and its options."""


def base_on_disk(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> str | tempfile.TemporaryDirectory:
    """Where an engine can read a base: the folder or hub id that it was loaded from, or else a new folder."""
    if model.name_or_path:
        return str(model.name_or_path)
    folder = tempfile.TemporaryDirectory(prefix="mua_rl-base-")
    model.save_pretrained(folder.name)
    tokenizer.save_pretrained(folder.name)
    return folder


def engine_for(
    model: PreTrainedModel,
    stack: LoRAStack,
    shape: StepShape,
    base: str,
    dtype: torch.dtype,
    on_disk: str | tempfile.TemporaryDirectory,
    share: float | None,
) -> StackedEngine:
    """The engine for some trials: the one of trials before, or a new one in its place.

    Args:
        model: The base with the trials' LoRAs.
        stack, shape: The trials, and the shape of their steps.
        base: The fingerprint of the base.
        dtype: What the trainer computes in.
        on_disk: See `base_on_disk`.
        share: A new engine's share of the GPU's memory; `None`: it is planned, once an old engine has given its memory
            back.

    Raises:
        UserError: It cannot start, or vLLM takes no LoRA of such a rank.
    """
    loras = -(-shape.trials // _LORAS) * _LORAS
    sequences = min(_SEQUENCES, loras * shape.prompts * shape.group)
    options = {
        "dtype": str(dtype).removeprefix("torch."),
        "max_loras": loras,
        "max_lora_rank": engine_rank(stack.rank),
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in stack.layers}),
        "max_model_len": shape.length,
        "max_num_seqs": sequences,
    }
    key = base, str(options)
    if key not in _running:
        while _running:
            _running.popitem()[1].close()
        folder = on_disk if isinstance(on_disk, str) else on_disk.name
        _running[key] = StackedEngine(options, folder, share or _planned_share(model, shape, sequences))
    leave_uncompiled(model)
    return _running[key]


def _planned_share(model: PreTrainedModel, shape: StepShape, sequences: int) -> float:
    """An engine's share of the GPU beside trials in training.

    Raises:
        UserError: The GPU is too small.
    """
    if not torch.cuda.is_available():
        return _CPU_SHARE
    gc.collect()  # frees the memory of trials that were trained before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    shares = plan(
        PolicySize.of(model),
        total=total,
        free=free + torch.cuda.memory_allocated(),  # the base and the trials have their place already
        micro_batch=shape.micro_batch,
        sequences=sequences,
        length=shape.length,
        longest=shape.length,
        compute_bytes=shape.compute_bytes,
    )
    print(f"mua_rl: GPU memory as planned: {shares}", flush=True)
    return shares.utilization
