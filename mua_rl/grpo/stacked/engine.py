"""Answers of all trials from one vLLM engine in this process, each prompt with its trial's LoRA.

The engine loads the base once and is handed A and B of all trials whenever it shall answer. An engine takes up to a
minute to start, so it is kept for the next trials with the same base.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any
from unittest import mock

import torch

from mua_rl.grpo.setup import free_port
from mua_rl.grpo.stacked.generation import Answers
from mua_rl.grpo.stacked.memory import Work
from mua_rl.grpo.stacked.stack import LoRAStack
from mua_rl.rollouts.lora_engine import adapter_llm, engine_rank
from mua_rl.rollouts.memory import PolicySize, plan
from mua_rl.rollouts.sync import engine_failures, engine_start

_LORAS = 8  # an engine has room for a multiple of it, so that it serves fewer trials that come later too
_SEQUENCES = 512  # the most at once: vLLM captures CUDA graphs for no more
_BATCH_TOKENS = 4096  # as TRL sets it: vLLM takes more memory for more
_CPU_SHARE = 0.3  # vLLM asks for one on a CPU too


@dataclass(frozen=True)
class EngineSettings:
    """What an engine is made for.

    Attributes:
        base: Fingerprint of the base policy.
        loras: At once.
        rank: The largest of them, one of vLLM's.
        layers: Last names of the layers with LoRA.
        length: Tokens of the longest prompt and completion together.
        sequences: Generated at once.
        dtype: What the trainer computes in.
    """

    base: str
    loras: int
    rank: int
    layers: tuple[str, ...]
    length: int
    sequences: int
    dtype: str

    @classmethod
    def of(cls, stack: LoRAStack, work: Work, base: str, dtype: torch.dtype) -> "EngineSettings":
        """Those that trials need.

        Raises:
            UserError: vLLM takes no LoRA of such a rank.
        """
        loras = -(-work.trials // _LORAS) * _LORAS
        layers = tuple(sorted({name.rpartition(".")[2] for name in stack.layers}))
        sequences = min(_SEQUENCES, loras * work.prompts * work.group)
        return cls(
            base, loras, engine_rank(stack.rank), layers, work.length, sequences, str(dtype).removeprefix("torch.")
        )


def gpu_share(size: PolicySize, work: Work, settings: EngineSettings) -> float:
    """The engine's share of the GPU beside trials in training.

    Args:
        size: Of the base and of A and B of all trials.
        work: Of the trials.
        settings: Of the engine.

    Raises:
        UserError: The GPU is too small.
    """
    if not torch.cuda.is_available():
        return _CPU_SHARE
    gc.collect()  # of trials that have been trained before
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    made = plan(
        size,
        total=total,
        free=free + torch.cuda.memory_allocated(),  # the base and the trials have their place already
        micro_batch=work.micro_batch,
        sequences=settings.sequences,
        length=work.length,
        longest=work.length,
        compute_bytes=work.compute_bytes,
    )
    print(f"mua_rl: GPU memory as planned: {made}", flush=True)
    return made.utilization


class StackedEngine:
    """An engine with the LoRAs of K trials.

    Args:
        settings: What it is made for.
        folder: Folder, or hub id, of the base.
        share: Of the GPU's memory.

    Raises:
        UserError: It cannot start.
    """

    def __init__(self, settings: EngineSettings, folder: str, share: float) -> None:
        launch = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        launch |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        print("mua_rl: starting the vLLM engine, which takes up to a minute", flush=True)
        options = {"gpu_memory_utilization": share}
        with engine_start(options), mock.patch.dict(os.environ, launch):  # not for the runs that are started from here
            self.llm = adapter_llm(
                **options,
                model=folder,
                dtype=settings.dtype,
                enable_lora=True,
                max_loras=settings.loras,
                max_lora_rank=settings.rank,
                lora_target_modules=list(settings.layers),
                max_model_len=settings.length,
                max_num_seqs=settings.sequences,
                max_num_batched_tokens=max(_BATCH_TOKENS, settings.length),
                distributed_executor_backend="external_launcher",
                logprobs_mode="processed_logprobs",
                enforce_eager=not torch.cuda.is_available(),  # compiling costs a CPU run minutes
            )
        self.lora_dtype = self.llm.llm_engine.vllm_config.lora_config.lora_dtype
        self.adapters: list[Any] = []
        self._versions = count(1)

    def sync(self, stack: LoRAStack) -> torch.Tensor:
        """Take the trials as they are now in place of all that were there before.

        A trial with values that are not finite is taken without its B: none of its numbers shall be in the engine's
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
            tensors = export_arm(stack, trial, self.lora_dtype)
            if not finite[row]:
                tensors = {name: torch.zeros_like(matrix) for name, matrix in tensors.items()}
            self.adapters.append(self.llm.take(f"mua_rl-{os.getpid()}-{trial}-{number}", number, tensors))
        self.llm.reset_prefix_cache()
        return finite

    def answer(
        self,
        stack: LoRAStack,
        prompts: list[list[list[int]]],
        copies: int,
        seeds: torch.Tensor | None,
        temperature: float,
        end_ids: list[int],
        pad_id: int,
        new_tokens: int,
    ) -> Answers:
        """Complete prompts with the trials as they are now.

        Args:
            stack: The trials.
            prompts: Token ids of p prompts of each trial.
            copies: Completions of each prompt; b = p · copies.
            seeds: `(K, p)`, of the draws; `None` is greedy.
            temperature: What logits are divided by before sampling.
            end_ids, pad_id, new_tokens: As `Decoder` takes them.

        Returns:
            On the CPU, with the log-probs that the engine gave the tokens.

        Raises:
            EngineFailed: The engine is gone.
        """
        from vllm import SamplingParams

        with engine_failures("while the trials were brought to it"):
            finite = self.sync(stack)
        asked, params, adapters = [], [], []
        for k, trial in enumerate(prompts):
            for i, ids in enumerate(trial):
                asked.append({"prompt_token_ids": ids})
                params.append(
                    SamplingParams(
                        n=copies,
                        temperature=0.0 if seeds is None else temperature,
                        seed=None if seeds is None else int(seeds[k, i]),
                        max_tokens=new_tokens,
                        stop_token_ids=end_ids,
                        ignore_eos=True,  # it is among the tokens above
                        detokenize=False,
                        logprobs=0,
                    )
                )
                adapters.append(self.adapters[k])
        with engine_failures("while it generated"):
            outputs = self.llm.generate(asked, sampling_params=params, lora_request=adapters, use_tqdm=False)
        found = [completion for output in outputs for completion in output.outputs]
        tokens = torch.full((len(found), new_tokens), pad_id)
        logps = torch.full((len(found), new_tokens), torch.nan)
        for row, completion in enumerate(found):
            ids = list(completion.token_ids)
            tokens[row, : len(ids)] = torch.tensor(ids)
            logps[row, : len(ids)] = torch.tensor(
                [step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)]
            )
        lengths = torch.tensor([len(completion.token_ids) for completion in found])
        shape = (len(prompts), -1)
        return Answers(
            tokens.view(*shape, new_tokens), lengths.view(shape), finite.cpu(), logps.view(*shape, new_tokens)
        )

    def close(self) -> None:
        """Give the memory back."""
        self.llm.llm_engine.engine_core.shutdown()
        self.llm.folders.close()
        del self.llm


_kept: dict[EngineSettings, StackedEngine] = {}


def engine(settings: EngineSettings, folder: str, share: Callable[[], float]) -> StackedEngine:
    """The engine for these settings: the one of trials before, or a new one in its place.

    Args:
        settings, folder: As `StackedEngine` takes them.
        share: Says the share of the GPU for a new one, once the old one has given its memory back.

    Raises:
        UserError: It cannot start.
    """
    if settings not in _kept:
        while _kept:
            _kept.popitem()[1].close()
        _kept[settings] = StackedEngine(settings, folder, share())
    return _kept[settings]


@torch.no_grad()
def export_arm(stack: LoRAStack, trial: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A and B of an active trial under PEFT's names, with the trial's multiplier inside B, see
    `vllm_lora.export_tensors`."""
    alpha = stack.adapters[trial].alpha(stack.adapters[trial].rank)
    named: dict[str, torch.Tensor] = {}
    for name, a, b in stack.matrices(trial):
        named[f"base_model.model.{name}.lora_A.weight"] = a.to(dtype, copy=True)
        named[f"base_model.model.{name}.lora_B.weight"] = (b * alpha).to(dtype)
    return named
