"""Vision-language finetuning: the learning-rate curves of LoRA and of full finetuning (issue 10).

Model, processor and training loop are transformers', the batches TRL's. Without flags it needs no hub: a small model of
SmolVLM's class learns to caption generated pictures (a minute and a half on one core, once, kept in
`mua_rl.lm.models.cache_folder()`), and is finetuned on captions of another house style: from the last group to the
first, the place ahead, and each colour by the next one's name. The paper's case:

    python scripts/finetune_captions.py --model Qwen/Qwen3-VL-2B-Instruct --dataset_name trl-lib/llava-instruct-mix \
        --examples 20000 --held_out 500 --steps 500 --batch_size 32 --ranks 4 16 64 256 full

LoRA sits on the MLP projections of the language model; `--target_modules all-linear` takes both towers. The metric is
minus the loss per token of held-out captions. A data set has the columns `images` or `image`, and `prompt` and
`completion` or `messages`. Most processors of the hub need torchvision; the small model's does not.
"""

import copy
import math
import random
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import curves
import data_sets
import numpy as np
import torch
from datasets import Dataset
from PIL import Image
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
    PrinterCallback,
    ProcessorMixin,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling as Collator

from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.lm import models

CELL = 8
"""Pixels: a picture has 4 × 4 cells, each a patch of the vision tower."""
_Y, _X = np.mgrid[-3.5:4, -3.5:4]
SHAPES = {
    "circle": np.hypot(_Y, _X) < 3.8,
    "square": np.maximum(abs(_Y), abs(_X)) < 3,
    "diamond": abs(_Y) + abs(_X) < 4.1,
    "triangle": 2 * abs(_X) < _Y + 4,
}
COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 30),
    "blue": (40, 40, 230),
    "yellow": (230, 220, 30),
    "purple": (180, 40, 200),
    "white": (245, 245, 245),
}
PLACES = {"top left": (0, 0), "top right": (0, 2), "bottom left": (2, 0), "bottom right": (2, 2)}
COUNTS = ("one", "two", "three")
PROMPT = "describe the picture"
IMAGE, END = "<image>", "<end_of_utterance>"
SPECIAL = ("<pad>", "<unk>", END, IMAGE, "<fake_token_around_image>", "<global-img>")
TEMPLATE = (
    "{% for message in messages %}{% for part in message.content %}"
    "{{ '<image>' if part.type == 'image' else ' ' + part.text }}"
    "{% endfor %}{{ ' <end_of_utterance>' if message.role == 'assistant' }}{% endfor %}"
)
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2}
PRETRAINING_PICTURES = 8192
FORMATS = (
    ["images", "messages"],
    ["image", "messages"],
    ["images", "prompt", "completion"],
    ["image", "prompt", "completion"],
)
"""Columns of a data set that can be learnt from; the first that are there."""


@dataclass
class CaptionArguments:
    """The base, the data and the length of a run."""

    model: str | None = field(
        default=None, metadata={"help": "A vision-language model, by hub id or folder. Default: the small one."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Images with conversations, by hub id or folder, for --model."}
    )
    examples: int = field(default=2048, metadata={"help": "Pictures to train on."})
    held_out: int = field(default=256, metadata={"help": "Pictures that are kept for the metric."})
    steps: int = field(default=60, metadata={"help": "Optimizer steps of a run."})
    batch_size: int = field(default=16, metadata={"help": "Pictures of a step."})
    pretraining_steps: int = field(default=600, metadata={"help": "Of the small model, 32 pictures each."})


def draw(rng: random.Random, shifted: bool) -> dict:
    """A picture of two groups of shapes, with its caption, as TRL's collator takes them."""
    pixels = np.full((4 * CELL, 4 * CELL, 3), rng.randrange(100), dtype=np.uint8)
    groups = []
    for place in sorted(rng.sample(list(PLACES), 2), key=PLACES.__getitem__):
        colour, shape, count = rng.choice(list(COLOURS)), rng.choice(list(SHAPES)), rng.randint(1, 3)
        for cell in rng.sample(range(4), count):
            top, left = (
                CELL * (corner + offset) for corner, offset in zip(PLACES[place], divmod(cell, 2), strict=True)
            )
            pixels[top : top + CELL, left : left + CELL][SHAPES[shape]] = COLOURS[colour]
        groups.append((COUNTS[count - 1], colour, shape + "s" * (count > 1), place))
    return {
        "images": [Image.fromarray(pixels)],
        "prompt": [{"role": "user", "content": PROMPT}],
        "completion": [{"role": "assistant", "content": shifted_caption(groups) if shifted else caption(groups)}],
    }


def caption(groups: list[tuple[str, str, str, str]]) -> str:
    """As in "two red circles top left and one blue square bottom right"."""
    return " and ".join(" ".join(group) for group in groups)


def shifted_caption(groups: list[tuple[str, str, str, str]]) -> str:
    """As in "bottom right square yellow one and top left circles green two" of the same picture."""
    names = list(COLOURS)
    renamed = dict(zip(names, names[1:] + names[:1], strict=True))
    return " and ".join(f"{place} {shape} {renamed[colour]} {n}" for n, colour, shape, place in reversed(groups))


def pictures(number: int, seed: int, shifted: bool) -> Dataset:
    """Generated pictures with captions."""
    rng = random.Random(seed)
    return Dataset.from_list([draw(rng, shifted) for _ in range(number)])


def conversations(name: str, number: int) -> Dataset:
    """The first pictures of a data set, each with a prompt and a completion (the last message of a conversation).

    Raises:
        UserError: There is no such data set, or it has other columns.
    """
    data = data_sets.read(name, f"train[:{number}]")
    if "messages" in data_sets.find_columns(data, name, *FORMATS):
        data = data.map(
            lambda example: {"prompt": example["messages"][:-1], "completion": example["messages"][-1:]},
            remove_columns="messages",
        )
    return data


def small_processor() -> Idefics3Processor:
    """Word-level, its images unscaled: a cell of a picture becomes an image token."""
    texts = [PROMPT, "and", *COUNTS, *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *PLACES]
    words = dict.fromkeys([*SPECIAL, *" ".join(texts).split()])
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    images = Idefics3ImageProcessorPil(  # by its own module's name: AutoProcessor asks for torchvision
        do_image_splitting=False, do_resize=False, do_pad=False, max_image_size={"longest_edge": 4 * CELL}
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token=END)
    return Idefics3Processor(images, fast, image_seq_len=16, chat_template=TEMPLATE)


def small_model(processor: Idefics3Processor, steps: int) -> Path:
    """The folder of a model of a million weights that captions the nominal pictures; trained once."""

    def make() -> list[nn.Module]:
        set_seed(0)
        pad, end, image = processor.tokenizer.convert_tokens_to_ids(["<pad>", END, IMAGE])
        tokens = {"pad_token_id": pad, "bos_token_id": None, "eos_token_id": end}
        text = {"model_type": "llama", "vocab_size": len(processor.tokenizer), "num_hidden_layers": 3, **tokens}
        vision = {"image_size": 4 * CELL, "patch_size": CELL, "num_hidden_layers": 2}
        config = Idefics3Config(
            text_config={**text, **SIZES, "num_key_value_heads": SIZES["num_attention_heads"]},
            vision_config={**vision, **SIZES},
            scale_factor=1,
            image_token_id=image,
            **tokens,
        )
        model = Idefics3ForConditionalGeneration(config)
        data = pictures(PRETRAINING_PICTURES, seed=0, shifted=False)
        learn = partial(train, data=data, collate=collator(processor), steps=steps, batch_size=32)
        return [curves.pretrain(model, learn, steps)]

    return curves.made_once(f"captions-{steps}", make)


def collator(processor: ProcessorMixin) -> Collator:
    """Batches whose loss is on the completions alone."""
    return Collator(processor, completion_only_loss=True)


def train(
    model: nn.Module,
    optimizer: Optimizer,
    schedule: LRScheduler,
    seed: int,
    data: Dataset,
    collate: Collator,
    steps: int,
    batch_size: int,
) -> None:
    """Train by transformers' `Trainer`, the data in the seed's order."""
    trainer = Trainer(
        model,
        TrainingArguments(**curves.trainer_settings(steps, batch_size, seed), remove_unused_columns=False),
        data_collator=collate,
        train_dataset=data,
        optimizers=(optimizer, schedule),  # type: ignore[arg-type]  # any scheduler does
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def measure(model: nn.Module, data: Dataset, collate: Collator, batch_size: int) -> tuple[float, float]:
    """Minus the loss per caption token, a mean over pictures, and its standard error over them."""
    losses, counts = curves.completion_losses(model, DataLoader(data, batch_size, collate_fn=collate))
    means = losses / counts
    return -means.mean().item(), means.std().item() / math.sqrt(len(means))


def base_of(arguments: CaptionArguments) -> tuple[nn.Module, ProcessorMixin, str]:
    """The model, its processor and its name.

    Raises:
        UserError: They cannot be loaded.
    """
    if arguments.model is None:
        processor = small_processor()
        folder = small_model(processor, arguments.pretraining_steps)
        return AutoModelForImageTextToText.from_pretrained(folder), processor, folder.name
    with models.loading(f"the model {arguments.model}"):
        path = models.model_path(arguments.model)
        processor = AutoProcessor.from_pretrained(path)
        model = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    return model, processor, arguments.model


def problem(arguments: CaptionArguments) -> curves.Field:
    """Base, training and held-out pictures as the curves' harness takes them.

    Raises:
        UserError: The model or the data set cannot be loaded, or there are too few pictures.
    """
    if arguments.dataset_name and not arguments.model:
        raise UserError("--dataset_name needs --model: the small model knows a few words alone.")
    curves.check_least(arguments, steps=1, batch_size=1, pretraining_steps=1, examples=1, held_out=2)
    number = arguments.held_out + arguments.examples
    if arguments.dataset_name:
        data = conversations(arguments.dataset_name, number)
    else:
        data = pictures(number, seed=1, shifted=True)
    data_sets.check_held_out(arguments.held_out, len(data))
    base, processor, name = base_of(arguments)
    collate, steps, batch_size = collator(processor), arguments.steps, arguments.batch_size
    held_out = data.select(range(arguments.held_out))
    training = data.select(range(arguments.held_out, len(data)))
    return curves.Field(
        algorithm="vision-language",
        task=arguments.dataset_name or "renamed-pictures",
        base=name,
        target_modules="mlp",
        load=lambda: copy.deepcopy(base).to(curves.device()),
        train=partial(train, data=training, collate=collate, steps=steps, batch_size=batch_size),
        measure=partial(measure, data=held_out, collate=collate, batch_size=batch_size),
        metric="minus held-out loss per caption token",
        steps=steps,
        batch={"pictures": batch_size},
    )


def main() -> None:
    """See the module."""
    curves.launch(CaptionArguments, problem)


if __name__ == "__main__":
    run_command(main)
