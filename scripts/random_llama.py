"""Llamas of several sizes with random weights, for measuring time and memory."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mua_rl.plan import SHAPES

SIZES = {"tiny": (128, 512, 4, 2, 2, 128), **{size: SHAPES[size][:6] for size in ("1.5b", "8b")}}
"""Hidden, intermediate, layers, heads, key heads, vocabulary."""


def llama_config(
    hidden: int, intermediate: int, layers: int, heads: int, key_heads: int, vocabulary: int, **more: Any
) -> Any:
    """The configuration of a Llama of the shape that `SIZES` lists."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        vocab_size=vocabulary,
        max_position_embeddings=2048,
        **{"tie_word_embeddings": False, **more},
    )


def random_llama(size: str, dtype: Any) -> Any:
    """A Llama of one of the sizes with random weights, on the GPU where there is one."""
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        return AutoModelForCausalLM.from_config(random_config(size), dtype=dtype)


def random_config(size: str) -> Any:
    """The configuration of one of the sizes; 135m is SmolLM2's."""
    shape = {**SIZES, "135m": SHAPES["135m"][:6]}[size]
    return llama_config(*shape, tie_word_embeddings=size == "135m", eos_token_id=2, pad_token_id=0)


def random_model(name: str, out: Path) -> Path | None:
    """The folder of a random model of one of `SIZES`, made on first use; `None` for a model that is not random."""
    if name not in SIZES:
        return None
    folder = out / f"random-{name}"
    if not (folder / "config.json").exists():
        from mua_rl.lm import models

        random_llama(name, torch.bfloat16).save_pretrained(folder)
        models.load_tokenizer(models.EMBEDDED).save_pretrained(folder)
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        words = tokenizer["model"]["vocab"]
        words |= {f"{i:x} ": i for i in range(len(words), random_config(name).vocab_size)}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    return folder
