"""What a GRPO run starts from: the base with its tokenizer, or the policy that an earlier run ended with."""

from copy import copy
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mua_rl.adapter.adapters import load_adapter
from mua_rl.adapter.fingerprint import fingerprint
from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments, model_init_kwargs
from mua_rl.lm import models
from mua_rl.lr.record import LRRecord
from mua_rl.run import processes
from mua_rl.run.folder import ADAPTER_FOLDER, MODEL_FOLDER, RunFolder
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
    """The model to start from: `--model`, or what the run `--start_from` ended with, its LoRA merged.

    Raises:
        UserError: A model or a run that cannot be used.
    """
    if start_from is None:
        model = _load(arguments, arguments.model)
        return model, Base(arguments.model, fingerprint(model))
    run = RunFolder.open_policy(start_from)
    record = LRRecord.load(run.path)
    if (run.path / MODEL_FOLDER).is_dir():
        model = _load(arguments, run.path / MODEL_FOLDER, _PLACES)
    else:
        model = _merged(arguments, run, record)
        for weight in model.parameters():  # buffers stay: rotary frequencies are fp32 in a model of any precision
            weight.data = weight.data.to(getattr(torch, arguments.dtype))
    return model, Base(f"{record.base_model} after {start_from}", fingerprint(model), record)


def _load(arguments: GRPOArguments, name: str | Path, without: tuple[str, ...] = ()) -> PreTrainedModel:
    options = {option: value for option, value in arguments.load_options.items() if option not in without}
    with processes.whole_weights(arguments):
        model = models.load_model(str(name), arguments.dtype, **options)
    if options.keys() & {"revision", *_PLACES}:
        model.name_or_path = ""  # an engine that loads by the name alone would have other weights
    return model


def _merged(arguments: GRPOArguments, run: RunFolder, record: LRRecord) -> PreTrainedModel:
    """A run's base, loaded as that run did, with its LoRA in the weights.

    Raises:
        UserError: The base has other weights by now.
    """
    settings = run.settings()
    first = copy(arguments)  # new ones would take the place of these in transformers' integration of DeepSpeed
    first.model, first.dtype = settings.get("model", models.EMBEDDED), "float32"
    first.model_init_kwargs = model_init_kwargs(settings)
    model, base = load_base(first, settings.get("start_from"))
    if base.fingerprint != record.base_fingerprint:
        raise UserError(
            f"{run.path} holds a LoRA for other weights than {base.name} has now: bring those back that it was trained "
            "on, or start from another run."
        )
    merged = load_adapter(model, run.path / ADAPTER_FOLDER).merge_and_unload()
    merged.name_or_path = ""  # what it was loaded from is no longer what it is
    return merged
