"""What a policy writes to prompts, in transformers' own way."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import GenerationConfig, PreTrainedTokenizerBase

from mua_rl.lm.text import completion_texts, prompt_ids


def end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Tokens that end a completion: the tokenizer's, and those of the model's generation settings, as for TRL."""
    ends = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *([] if ends is None else [ends] if isinstance(ends, int) else ends)})


@torch.no_grad()
def complete(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    min_new_tokens: int = 0,
) -> torch.Tensor:
    """What a policy itself writes, as it is trained: its softmax, not what a model's own generation settings make of it
    (those of Qwen2.5 have a repetition penalty and a top-k).

    Args:
        model, tokenizer: The policy.
        prompts: Token ids of each prompt.
        max_new_tokens, min_new_tokens: Bounds of a completion's length.
        temperature: 0 is greedy decoding.

    Returns:
        `(R, t)` token ids, filled up with the padding token after the end.
    """
    rows = [torch.tensor(ids, device=model.device) for ids in prompts]
    inputs = pad_sequence(rows, True, tokenizer.pad_token_id, padding_side="left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, padding_side="left")
    # transformers takes what is not said here from the model's own settings.
    options: dict[str, Any] = {"do_sample": False}
    if temperature != 0:
        options = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
        options |= {"typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0}
    settings = GenerationConfig(
        **options,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=min_new_tokens,
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_ids(model, tokenizer),
    )
    written = model.generate(input_ids=inputs, attention_mask=mask, generation_config=settings)
    return written[:, inputs.shape[1] :]


def generate(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence,
    max_new_tokens: int,
    temperature: float = 0.0,
    batch_size: int = 128,
    seed: int = 0,
    template: Mapping[str, Any] | None = None,
) -> list[str]:
    """One completion per prompt (a string or a list of messages); temperature 0 is greedy decoding.

    Sampling draws from torch's global generators, seeded with `seed`; their states are put back afterwards, so that an
    evaluation in mid-training changes nothing in the training.

    Args:
        model, tokenizer: The policy.
        prompts: Strings, or lists of messages.
        max_new_tokens: The longest completion.
        temperature, seed: How to sample.
        batch_size: Prompts that are answered at once.
        template: Options of the chat template.
    """
    was_training = model.training
    model.eval()
    completions: list[str] = []
    with torch.random.fork_rng(range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        for start in tqdm(range(0, len(prompts), batch_size), desc="held-out", leave=False, disable=None):
            ids = prompt_ids(tokenizer, prompts[start : start + batch_size], **(template or {}))
            answers = complete(model, tokenizer, ids, max_new_tokens, temperature)
            completions += completion_texts(tokenizer, answers)
    model.train(was_training)
    return completions
