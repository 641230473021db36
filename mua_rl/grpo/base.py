"""What a GRPO run starts from: the base with its tokenizer, or the policy that an earlier run ended with."""

from copy import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mua_rl.adapter.adapters import load_adapter
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.adapter.targets import is_packed
from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments, model_init_kwargs
from mua_rl.lm import models
from mua_rl.lr.record import LRRecord
from mua_rl.run import processes
from mua_rl.run.folder import ADAPTER_CONFIG, ADAPTER_FOLDER, MODEL_FOLDER, RECORD, RunFolder, is_adapter
from mua_rl.run.learning_rate import Base

_PLACES = ("gguf_file", "subfolder", "variant")
"""Options of `from_pretrained` that say where in its folder a model is."""


def load_tokenizer(arguments: GRPOArguments) -> PreTrainedTokenizerBase:
    """The tokenizer of `--tokenizer_name`, or else of `--model`.

    Raises:
        UserError: It cannot be loaded.
    """
    if arguments.tokenizer_name is None:
        return models.load_tokenizer(arguments.model, **arguments.load_options)
    return models.load_tokenizer(arguments.tokenizer_name, trust_remote_code=arguments.trust_remote_code)


def load_base(arguments: GRPOArguments, start_from: str | None) -> tuple[PreTrainedModel, Base]:
    """The model to start from: `--model`, or the policy of `--start_from`, its LoRA merged.

    Args:
        arguments: How to load it.
        start_from: A run, a checkpoint or `best` in one, an adapter that PEFT has saved, or `None`.

    Raises:
        UserError: A model or a run that cannot be used.
    """
    if start_from is None:
        model = _load(arguments, arguments.model)
        return model, Base(arguments.model, fingerprint(model))
    if is_adapter(start_from):
        model = _merge(_load(arguments, arguments.model), Path(start_from))
        return _cast(model, arguments), Base(f"{arguments.model} with {start_from}", fingerprint(model))
    run = RunFolder.around(start_from)
    is_end = run.path.resolve() == Path(start_from).resolve()
    if is_end:
        run = RunFolder.open_policy(start_from)
    record = LRRecord.load(run.path) if is_end or (run.path / RECORD).exists() else None
    folders = [run.path / ADAPTER_FOLDER, run.path / MODEL_FOLDER] if is_end else [Path(start_from)]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    if (folder / ADAPTER_CONFIG).exists():
        model = _cast(_merge(_base_of(arguments, run, record), folder), arguments)
    else:
        model = _load(arguments, folder, _PLACES)
    name = record.base_model if record else run.settings().get("model", models.EMBEDDED)
    return model, Base(f"{name} after {start_from}", fingerprint(model), record)


def _cast(model: PreTrainedModel, arguments: GRPOArguments) -> PreTrainedModel:
    """The model with its weights as `--dtype` says; buffers stay, as rotary frequencies are fp32 in every model."""
    for weight in model.parameters():
        weight.data = weight.data.to(getattr(torch, arguments.dtype))
    return model


def _load(arguments: GRPOArguments, name: str | Path, without: tuple[str, ...] = ()) -> PreTrainedModel:
    options = {option: value for option, value in arguments.load_options.items() if option not in without}
    with processes.whole_weights(arguments):
        model = models.load_model(str(name), arguments.dtype, **options)
    if models.is_quantised(model) and not any(map(is_packed, model.modules())):
        raise UserError(
            f"{name} is quantised in a way that no LoRA is trained on here: take the model as it was before, with "
            "--load_in_4bit where it is too large."
        )
    if options.keys() & {"revision", *_PLACES}:
        model.name_or_path = ""  # an engine that loads by the name alone would have other weights
    return model


def _base_of(arguments: GRPOArguments, run: RunFolder, record: LRRecord | None) -> PreTrainedModel:
    """The base of a run's LoRA, loaded as that run did.

    Raises:
        UserError: The base has other weights by now.
    """
    settings = run.settings()
    first = copy(arguments)  # new ones would take the place of these in transformers' integration of DeepSpeed
    first.model, first.dtype = settings.get("model", models.EMBEDDED), "float32"
    first.model_init_kwargs, first.load_in_4bit = model_init_kwargs(settings), settings.get("load_in_4bit", False)
    model, base = load_base(first, settings.get("start_from"))
    if record is not None and base.fingerprint != record.base_fingerprint:
        raise UserError(
            f"{run.path} holds a LoRA for other weights than {base.name} has now: bring those back that it was trained "
            "on, or start from another run."
        )
    return model


def _merge(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with a saved adapter in its weights.

    Raises:
        UserError: The folder holds no adapter of this model, or one that is not a part of the weights.
    """
    if models.is_quantised(model):  # an adapter is lost in the rounding of packed weights
        model = model.dequantize()
    try:
        merged = load_adapter(model, folder).merge_and_unload()
    except AttributeError:
        raise UserError(
            f"the adapter in {folder} cannot be merged into the weights: give a LoRA, or its like."
        ) from None
    merged.name_or_path = ""  # what it was loaded from is no longer what it is
    return merged
