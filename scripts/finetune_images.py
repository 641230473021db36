"""Image classification: the learning-rate curves of LoRA and of FFT with transformers' `Trainer` (issue 10).

Without flags it needs no hub: a small vision transformer (ViT) learns scikit-learn's digits (a minute on one core,
once, kept in `mua_rl.lm.models.cache_folder()`), and is finetuned on the same digits lying on their side.

    python scripts/finetune_images.py                       # the curves
    python scripts/finetune_images.py --lr 0.001 --rank 8   # one run

Any model of `AutoModelForImageClassification` whose pixels are scaled to one size and normalised will do, and any data
set with an image and a label, from the hub or a folder (`FOLDER/train/LABEL/1.png`). The paper's case:

    python scripts/finetune_images.py --model google/vit-huge-patch14-224-in21k --dataset_name ILSVRC/imagenet-1k \\
        --dataset_test_split validation --held_out 5000 --max_steps 2000 --per_device_train_batch_size 64 \\
        --ranks 4 16 64 256 full

LoRA sits on the attention and the MLP of every layer; a head without pretrained weights is trained fully beside it, at
`--head_lr`. The metric is minus the held-out loss. Needs `pip install pillow scikit-learn`, and no torchvision.
"""

from dataclasses import dataclass, field
from typing import Any

import classification
import curves
import data_sets
import numpy as np
import torch
from classification import Classification, ClassifierArguments
from datasets import Dataset
from PIL import Image
from sklearn.datasets import load_digits
from transformers import (
    AutoModelForImageClassification,
    ImageProcessingMixin,
    PretrainedConfig,
    ViTConfig,
    ViTForImageClassification,
    set_seed,
)

from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.lm.models import model_path

TARGET_MODULES = r".*\.layers\.\d+\..*\.(q_proj|k_proj|v_proj|o_proj|fc1|fc2)"
"""The linear layers of every layer of a ViT; for others, --target_modules."""
MODES = {1: "L", 3: "RGB"}
"""Pillow's name for images of so many channels."""


@dataclass
class ImageArguments(ClassifierArguments):
    """What images need beside."""

    image_column: str = field(default="image", metadata={"help": "Of the data set."})
    pretraining_steps: int = field(default=600, metadata={"help": "Of the small model."})


@dataclass(frozen=True)
class Pixels:
    """From images to a model's inputs.

    Attributes:
        channels: 1 (grey) or 3 (RGB).
        size: Height and width in pixels.
        mean, std: Of each channel, on a scale from 0 to 1; what a model's pixels are normalised with.
    """

    channels: int
    size: int
    mean: list[float]
    std: list[float]

    @classmethod
    def of_model(cls, config: PretrainedConfig, name: str) -> "Pixels":
        """As a model was pretrained.

        Raises:
            UserError: It does not take square images, grey or RGB.
        """
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", 3)
        if not isinstance(size, int) or channels not in MODES:
            raise UserError(f"{name} does not say that it takes square images of 1 or 3 channels.")
        try:
            saved, _ = ImageProcessingMixin.get_image_processor_dict(model_path(name))
        except OSError:
            saved = {}
        half = [0.5] * channels
        return cls(channels, size, saved.get("image_mean") or half, saved.get("image_std") or half)

    def __call__(self, images: list[Image.Image]) -> torch.Tensor:
        """`(N, channels, size, size)`."""
        mode, shape = MODES[self.channels], (self.size, self.size)
        resized = [image.convert(mode).resize(shape, Image.Resampling.BILINEAR) for image in images]
        values = torch.tensor(np.stack([np.asarray(image, dtype=np.float32) for image in resized]) / 255)
        values = values.reshape(len(images), self.size, self.size, self.channels)
        return ((values - torch.tensor(self.mean)) / torch.tensor(self.std)).movedim(-1, 1)


def encoded(rows: Dataset, pixels: Pixels, labels: list[Any], arguments: ImageArguments) -> Dataset:
    """Rows that become pixels and class numbers when they are read."""

    def encode(batch: dict[str, list]) -> dict[str, Any]:
        numbers = [labels.index(label) for label in batch[arguments.label_column]]
        return {"pixel_values": pixels(batch[arguments.image_column]), "labels": numbers}

    return rows.with_transform(encode)


def digits(turned: bool, held_out: int) -> tuple[Dataset, Dataset]:
    """1297 digits, 8 × 8, to train on, and up to 500 of other writers; turned: on their side."""
    images, labels = load_digits(return_X_y=True)
    images = (images.reshape(-1, 8, 8) * 255 / 16).astype(np.uint8)
    if turned:
        images = np.rot90(images, axes=(1, 2))
    rows = Dataset.from_dict({"image": [Image.fromarray(image) for image in images], "label": labels.tolist()})
    return rows.select(range(1297)), rows.select(range(1297, min(1297 + held_out, len(rows))))


def small_vit(arguments: ImageArguments) -> str:
    """The folder of a ViT of three layers and width 128 that reads digits."""

    def make() -> list[Any]:
        set_seed(0)
        config = ViTConfig(
            image_size=8,
            patch_size=2,
            num_channels=1,
            hidden_size=128,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=512,
            num_labels=10,  # type: ignore[call-arg]
        )
        rows, _ = digits(False, held_out=2)
        rows = encoded(rows, Pixels.of_model(config, "the small model"), list(range(10)), ImageArguments())
        examples = Classification(rows, rows, None, arguments.pretraining_steps, 64)
        return [curves.pretrain(ViTForImageClassification(config), examples.train, examples.steps)]

    return str(curves.made_once(f"vit-digits-{arguments.pretraining_steps}", make))


def problem(arguments: ImageArguments) -> curves.Field:
    """Base, training and held-out images as the curves' harness takes them.

    Raises:
        UserError: The model or the data cannot be had.
    """
    classification.check(arguments)
    if arguments.model and arguments.dataset_name:
        folder, task = arguments.model, arguments.dataset_name
        train_rows, held_out_rows = classification.read_rows(arguments)
    else:
        folder, task = small_vit(arguments), "turned-digits"
        train_rows, held_out_rows = digits(True, arguments.held_out)
    columns = [arguments.image_column, arguments.label_column]
    data_sets.find_columns(train_rows, task, columns, flags="--image_column and --label_column")
    data_sets.check_images(train_rows, arguments.image_column)
    labels = classification.labels_of(train_rows, held_out_rows, arguments.label_column)
    model, head = classification.load_base(AutoModelForImageClassification, folder, labels)
    pixels = Pixels.of_model(model.config, folder)
    train_rows, held_out_rows = (encoded(rows, pixels, labels, arguments) for rows in (train_rows, held_out_rows))
    examples = Classification(
        train_rows, held_out_rows, None, arguments.max_steps, arguments.per_device_train_batch_size
    )
    return classification.problem_of("images", arguments, task, (model, head), TARGET_MODULES, examples)


def main() -> None:
    """See the module."""
    curves.launch(ImageArguments, problem)


if __name__ == "__main__":
    run_command(main)
