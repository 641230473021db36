"""What the classifiers' scripts share: transformers' `Trainer`, labels, and a head for new ones (issue 10)."""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import curves
import data_sets
import torch
from datasets import ClassLabel, Dataset, Value
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed

from mua_rl.errors import UserError
from mua_rl.lm import models


@dataclass
class ClassifierArguments:
    """The base, the data and the length of a run."""

    model: str | None = field(default=None, metadata={"help": "A model folder or a hub id. Default: the small model."})
    dataset_name: str | None = field(default=None, metadata={"help": "A folder or a hub id, for --model."})
    dataset_config: str | None = field(default=None, metadata={"help": "Of a data set of the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Of the data set."})
    dataset_test_split: str = field(default="test", metadata={"help": "The split that the metric is measured on."})
    label_column: str = field(default="label", metadata={"help": "Of the data set."})
    held_out: int = field(default=1000, metadata={"help": "Examples of that split, at most."})
    max_steps: int = field(default=60, metadata={"help": "Optimizer steps of a run."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples of an optimizer step."})
    pretraining_steps: int = field(default=2000, metadata={"help": "Of the small model."})


@dataclass(frozen=True)
class Classification:
    """Examples to learn and those to measure with, for transformers' `Trainer`.

    Attributes:
        train_rows, held_out_rows: A model's inputs, and `labels`.
        collate: Makes a batch of rows; `None`: transformers' default.
        steps: Optimizer steps of a run.
        batch_size: Examples of a step.
    """

    train_rows: Dataset
    held_out_rows: Dataset
    collate: Callable[[list[Any]], dict[str, Any]] | None
    steps: int
    batch_size: int

    def trainer(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        schedule: LRScheduler | None = None,
        seed: int = 0,
    ) -> Trainer:
        """Transformers' own, silent and saving nothing."""
        trainer = Trainer(
            model,
            TrainingArguments(
                **curves.trainer_settings(self.steps, self.batch_size, seed),
                per_device_eval_batch_size=2 * self.batch_size,
                label_names=["labels"],
                remove_unused_columns=False,  # there are none
            ),
            data_collator=self.collate,
            train_dataset=self.train_rows,
            optimizers=(optimizer, schedule),  # type: ignore[arg-type]  # any schedule will do
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def train(self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, seed: int) -> None:
        """One run; the seed shuffles the examples."""
        self.trainer(model, optimizer, schedule, seed).train()

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """Minus the mean loss over the held-out examples, and its standard error.

        Accuracy tells learning rates apart no better: between the means of three rates near the best and between seeds
        lies a factor of 1.4 for reviews with either, and of 1.5, with the loss 1.6, for digits.
        """
        held_out = self.trainer(model).predict(self.held_out_rows)
        logits, labels = torch.tensor(held_out.predictions), torch.tensor(held_out.label_ids)
        losses = cross_entropy(logits.double(), labels, reduction="none")
        return -losses.mean().item(), losses.std().item() / len(losses) ** 0.5


def read_rows(arguments: ClassifierArguments) -> tuple[Dataset, Dataset]:
    """Training and held-out rows of a data set of the hub or a folder.

    Raises:
        UserError: They cannot be read, or are too few.
    """
    name, config = str(arguments.dataset_name), arguments.dataset_config
    train = data_sets.read(name, arguments.dataset_train_split, config)
    held_out = data_sets.read(name, arguments.dataset_test_split, config, least=2)
    return train, held_out.shuffle(seed=0).select(range(min(arguments.held_out, len(held_out))))


def labels_of(train_rows: Dataset, held_out_rows: Dataset, column: str) -> list[Any]:
    """The labels that there are, ascending: class k is the k-th.

    Args:
        train_rows, held_out_rows: Examples.
        column: Of the label.

    Raises:
        UserError: The column has no labels, or only held-out rows have one of them.
    """
    if not isinstance(train_rows.features[column], ClassLabel | Value):
        raise UserError(f"the column {column} holds no labels: say which does with --label_column.")
    found, held_out = (rows.select_columns([column]).unique(column) for rows in (train_rows, held_out_rows))
    if len(found) < 2 or not all(isinstance(label, int | str) for label in found):
        raise UserError(f"the column {column} does not have two labels or more, numbers or words: {found[:5]}.")
    if unknown := [label for label in held_out if label not in found]:
        raise UserError(f"held-out examples have labels that no training example has: {unknown[:3]}.")
    return sorted(found)


def load_base(auto: Any, name: str, labels: list[Any]) -> tuple[PreTrainedModel, str | None]:
    """A pretrained model with a head for these labels, and the head's name where it is new (the same each time).

    Args:
        auto: The class that loads it, `AutoModelFor…Classification`.
        name: A folder or a hub id.
        labels: Of the classes.

    Raises:
        UserError: There is no such model.
    """
    id2label = {number: str(label) for number, label in enumerate(labels)}
    label2id = {label: number for number, label in id2label.items()}
    set_seed(0)
    with models.loading(f"the model {name}"):
        model, info = auto.from_pretrained(
            models.model_path(name),
            id2label=id2label,
            label2id=label2id,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            dtype=torch.float32,
        )
    new = {*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])}
    body = f"{model.base_model_prefix}."
    if lost := sorted(key for key in new if key.startswith(body) and "pooler" not in key):
        raise UserError(f"{name} is no pretrained {type(model).__name__}: it lacks {', '.join(lost[:3])}.")
    heads = {key.split(".")[0] for key in new if not key.startswith(body)}
    return model, min(heads, default=None)


def problem_of(
    algorithm: str,
    arguments: ClassifierArguments,
    task: str,
    base: tuple[PreTrainedModel, str | None],
    target_modules: str,
    examples: Classification,
) -> curves.Field:
    """The problem as the curves' harness takes it."""
    model, head = base
    return curves.Field(
        algorithm=algorithm,
        task=task,
        base=arguments.model or Path(str(model.name_or_path)).name,
        target_modules=target_modules,
        load=lambda: copy.deepcopy(model).to(curves.device()),  # type: ignore[arg-type]
        train=examples.train,
        measure=examples.measure,
        metric="−(held-out loss)",
        steps=arguments.max_steps,
        batch={"examples": arguments.per_device_train_batch_size},
        head=head,
    )


def check(arguments: ClassifierArguments) -> None:
    """Refuse what no run can be made of.

    Raises:
        UserError: A number is too small, or one of model and data set is not given.
    """
    curves.check_least(arguments, max_steps=1, per_device_train_batch_size=1, pretraining_steps=1, held_out=2)
    if (arguments.model is None) != (arguments.dataset_name is None):
        raise UserError("--model and --dataset_name go together; without both, a small model is finetuned.")
