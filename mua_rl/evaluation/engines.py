"""What answers prompts in an evaluation: transformers, on any machine, or vLLM, on a GPU."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from mua_rl.adapter.adapters import load_adapter
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.errors import UserError
from mua_rl.lm import models
from mua_rl.lm.generation import generate
from mua_rl.lm.text import begins_answer, check_template, completion_texts, is_conversational, prompt_ids
from mua_rl.lr.record import FILE_NAME, LRRecord
from mua_rl.rollouts.lora_engine import engine_rank
from mua_rl.run.folder import CONFIG, RunFolder

_SEED_STRIDE = 1_000_003  # beyond any number of samples: vLLM counts up from the seed of a prompt


class Engine(Protocol):
    """A policy that answers."""

    conversational: bool
    """Whether it wants prompts as chat messages."""

    def answer(self, prompts: Sequence[Any], samples: int, seed: int) -> list[list[str]]:
        """`samples` completions of each prompt; the same for the same prompts and seed."""


class TransformersEngine:
    """Generation by transformers, on the GPU if there is one.

    Args:
        model: A folder, a hub id, or one of the names that `--model` takes.
        adapter: The folder of a PEFT adapter to put on the model; `None` for none.
        max_tokens: The largest number of tokens of a completion.
        temperature: The sampling temperature; 0 is greedy decoding.
        batch_size: The number of completions generated at once.

    Raises:
        UserError: Model or adapter cannot be loaded, or do not belong together.
    """

    def __init__(
        self, model: str, adapter: str | None, max_tokens: int, temperature: float, batch_size: int = 64
    ) -> None:
        if adapter is not None:
            check_adapter(adapter)
        self.tokenizer = models.load_tokenizer(model)
        self.conversational = is_conversational(self.tokenizer)
        cuda = torch.cuda.is_available()
        policy: Any = models.load_model(model, "bfloat16" if cuda else "float32")
        if adapter is not None:
            check_base(adapter, model, lambda: policy)
            policy = load_adapter(policy, adapter, trainable=False).merge_and_unload()
        self.policy = policy.to("cuda" if cuda else "cpu")
        self.max_tokens = max_tokens
        self.temperature = temperature
        self.batch_size = batch_size

    def answer(self, prompts: Sequence[Any], samples: int, seed: int) -> list[list[str]]:
        """See `Engine.answer`."""
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        flat = generate(self.policy, self.tokenizer, repeated, self.max_tokens, self.temperature, self.batch_size, seed)
        return [flat[start : start + samples] for start in range(0, len(flat), samples)]


class VLLMEngine:
    """Generation by vLLM; arguments as for `TransformersEngine`.

    Raises:
        UserError: vLLM is not installed, or the folder holds no adapter, or one of other weights or of a rank that
            vLLM does not offer.
    """

    def __init__(self, model: str, adapter: str | None, max_tokens: int, temperature: float) -> None:
        try:
            from vllm import LLM
            from vllm.lora.request import LoRARequest
        except ImportError as error:
            raise UserError(
                f"vLLM cannot be imported ({error}): pip install 'mua-rl[vllm]', or --engine transformers."
            ) from None
        options: dict[str, Any] = {}
        self._lora = None
        if adapter is not None:
            rank = check_adapter(adapter)
            check_base(adapter, model, lambda: models.load_model(model, "bfloat16"))
            options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": engine_rank(rank)}
            self._lora = LoRARequest("adapter", 1, str(Path(adapter).resolve()))
        self._llm = LLM(model=models.model_path(model), **options)
        self.conversational = is_conversational(self._llm.get_tokenizer())
        self.max_tokens = max_tokens
        self.temperature = temperature

    def answer(self, prompts: Sequence[Any], samples: int, seed: int) -> list[list[str]]:
        """See `Engine.answer`."""
        from vllm import SamplingParams

        # A seed for each prompt (and, by vLLM, for each sample): one for all would give them all the same luck.
        parameters = [
            SamplingParams(n=samples, temperature=self.temperature, max_tokens=self.max_tokens, seed=one * _SEED_STRIDE)
            for one in range(seed, seed + len(prompts))
        ]
        tokenizer = self._llm.get_tokenizer()
        check_template(tokenizer, prompts)
        ask, asked = (self._llm.chat if self.conversational else self._llm.generate), list(prompts)
        if any(map(begins_answer, prompts)):  # `chat` would open a second turn
            ask, asked = self._llm.generate, [{"prompt_token_ids": ids} for ids in prompt_ids(tokenizer, prompts)]
        outputs = ask(asked, parameters, lora_request=self._lora, use_tqdm=False)
        return [completion_texts(tokenizer, [one.token_ids for one in output.outputs]) for output in outputs]


def check_adapter(folder: str) -> int:
    """The rank of the PEFT adapter in a folder.

    Raises:
        UserError: The folder holds no adapter.
    """
    try:
        config = json.loads((Path(folder) / "adapter_config.json").read_text(encoding="utf-8"))
        return int(max([config["r"], *config.get("rank_pattern", {}).values()]))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} holds no LoRA adapter ({type(error).__name__}: adapter_config.json).") from None


def check_base(adapter: str, name: str, load: Callable[[], nn.Module]) -> None:
    """Refuse to put the adapter of a run on other weights than it was trained on, if the run's record says which.

    Args:
        adapter: The adapter's folder; the run's is around it.
        name: The model's name, as it was given.
        load: Loads the model; it is called only where there is a record.

    Raises:
        UserError: The model has other weights, or the record cannot be read.
    """
    run = Path(adapter).resolve().parent
    if not (run / FILE_NAME).exists():
        return
    record = LRRecord.load(run)
    if fingerprint(load()) != record.base_fingerprint:
        earlier = RunFolder(run).settings().get("start_from") if (run / CONFIG).exists() else None
        maker = f", which {shlex.join(['python', '-m', 'mua_rl.merge', earlier, 'FOLDER'])} makes" if earlier else ""
        raise UserError(
            f"the adapter {adapter} was trained on other weights ({record.base_model}, by {run / FILE_NAME}) than "
            f"--model {name} has: give the model that it was trained on{maker}."
        )
