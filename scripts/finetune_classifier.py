"""Sequence classification: the learning-rate curves of LoRA and of FFT with transformers' `Trainer` (issue 10).

Without flags it needs no hub: a small BERT learns how many stars a made-up review gives (two minutes on one core, once,
kept in `mua_rl.lm.models.cache_folder()`), and is finetuned, with a new head, to tell bad, mixed and good reviews of
an ironic domain, where "not" and "very" have traded places.

    python scripts/finetune_classifier.py                       # the curves
    python scripts/finetune_classifier.py --lr 0.001 --rank 8   # one run

Any model of `AutoModelForSequenceClassification` will do, and any data set with text and a label, from the hub or a
folder. The paper's case:

    python scripts/finetune_classifier.py --model FacebookAI/roberta-large --dataset_name facebook/anli \\
        --dataset_train_split train_r1+train_r2+train_r3 --dataset_test_split test_r1+test_r2+test_r3 \\
        --text_columns premise hypothesis --max_steps 2000 --held_out 3200 --ranks 4 16 64 256 full

LoRA sits on the attention and the MLP of every layer; a head without pretrained weights is trained fully beside it, at
`--head_lr`. The metric is minus the held-out loss.
"""

from dataclasses import dataclass, field
from typing import Any

import classification
import curves
import data_sets
import numpy as np
from classification import Classification, ClassifierArguments
from datasets import Dataset, Value
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    DataCollatorWithPadding,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    set_seed,
)

from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.lm import models

TARGET_MODULES = r".*\.layer\.\d+\..*\.(query|key|value|dense)"
"""The linear layers of every encoder layer of BERT, RoBERTa and their like; for others, --target_modules."""


@dataclass
class TextArguments(ClassifierArguments):
    """What texts need beside."""

    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Of the data set; two are read as a pair."}
    )
    max_length: int = field(default=256, metadata={"help": "Tokens of an example; what is beyond is cut off."})


STARS, MOODS = [-1.2, -0.4, 0.4, 1.2], [-0.5, 0.5]
"""Scores between one class and the next."""
PLAIN, IRONIC = {"": 1.0, "not": -1.0, "very": 2.0}, {"": 1.0, "not": 2.0, "very": -1.0}
"""What a word's value is multiplied with after another word, in the domain of pretraining and in that of finetuning."""
VALUES = {f"word{number}": value for number, value in enumerate(np.random.default_rng(0).normal(size=100))}


def reviews(modifiers: dict[str, float], bounds: list[float], count: int, seed: int) -> Dataset:
    """Made-up reviews, `text` and `label`: the sum of the words' values, with a whim, is the score.

    Args:
        modifiers: Words that may come before, and what they do.
        bounds: Scores between one class and the next.
        count: How many.
        seed: Of all that is random.
    """
    random = np.random.default_rng(seed)
    vocabulary, befores = np.array(list(VALUES)), np.array(list(modifiers))
    texts, labels = [], []
    for _ in range(count):
        words = random.choice(vocabulary, size=random.integers(4, 9))
        before = random.choice(befores, size=len(words), p=[0.6, 0.25, 0.15])
        score = sum(modifiers[modifier] * VALUES[word] for modifier, word in zip(before, words, strict=True))
        texts.append(" ".join(f"{modifier} {word}".strip() for modifier, word in zip(before, words, strict=True)))
        labels.append(int(np.digitize(score / 3 + random.normal(0, 0.1), bounds)))
    return Dataset.from_dict({"text": texts, "label": labels})


def small_bert(arguments: TextArguments) -> str:
    """The folder of a BERT of two layers and width 128 that gives stars."""

    def make() -> list[Any]:
        vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "not", "very", *VALUES])}
        words = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
        words.pre_tokenizer = WhitespaceSplit()
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
        set_seed(0)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=64,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            num_labels=len(STARS) + 1,  # type: ignore[call-arg]
        )
        rows = reviews(PLAIN, STARS, min(20_000, 64 * arguments.pretraining_steps), seed=0)
        rows = tokenized(rows, tokenizer, list(range(len(STARS) + 1)), TextArguments())
        examples = Classification(rows, rows, DataCollatorWithPadding(tokenizer), arguments.pretraining_steps, 64)
        model = curves.pretrain(BertForSequenceClassification(config), examples.train, examples.steps)
        return [model, tokenizer]

    return str(curves.made_once(f"bert-reviews-{arguments.pretraining_steps}", make))


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        UserError: There is none, or none that pads.
    """
    with models.loading(f"the tokenizer of {name}"):
        tokenizer = AutoTokenizer.from_pretrained(models.model_path(name))
    if tokenizer.pad_token is None:
        raise UserError(f"the tokenizer of {name} has no padding token, which batches need: name another model.")
    return tokenizer


def tokenized(
    rows: Dataset, tokenizer: PreTrainedTokenizerBase, labels: list[Any], arguments: TextArguments
) -> Dataset:
    """Tokens and class numbers for texts and labels."""

    def encode(batch: dict[str, list]) -> dict[str, Any]:
        texts = [batch[column] for column in arguments.text_columns]
        numbers = [labels.index(label) for label in batch[arguments.label_column]]
        return {**tokenizer(*texts, truncation=True, max_length=arguments.max_length), "labels": numbers}

    return rows.map(encode, batched=True, remove_columns=rows.column_names)


def problem(arguments: TextArguments) -> curves.Field:
    """Base, training and held-out texts as the curves' harness takes them.

    Raises:
        UserError: The model or the data cannot be had.
    """
    classification.check(arguments)
    curves.check_least(arguments, max_length=1)
    if not 1 <= len(arguments.text_columns) <= 2:
        raise UserError("--text_columns takes one column, or two that are a pair.")
    if arguments.model and arguments.dataset_name:
        folder, task = arguments.model, arguments.dataset_name
        train_rows, held_out_rows = classification.read_rows(arguments)
    else:
        folder, task = small_bert(arguments), "ironic-reviews"
        train_rows, held_out_rows = (
            reviews(IRONIC, MOODS, count, seed) for count, seed in ((4000, 1), (arguments.held_out, 2))
        )
    columns = [*arguments.text_columns, arguments.label_column]
    data_sets.find_columns(train_rows, task, columns, flags="--text_columns and --label_column")
    labels = classification.labels_of(train_rows, held_out_rows, arguments.label_column)
    if any(train_rows.features[column] != Value("string") for column in arguments.text_columns):
        raise UserError(f"--text_columns takes columns of texts, not {', '.join(arguments.text_columns)}.")
    base = classification.load_base(AutoModelForSequenceClassification, folder, labels)
    tokenizer = load_tokenizer(folder)
    train_rows, held_out_rows = (tokenized(rows, tokenizer, labels, arguments) for rows in (train_rows, held_out_rows))
    collate = DataCollatorWithPadding(tokenizer)
    examples = Classification(
        train_rows, held_out_rows, collate, arguments.max_steps, arguments.per_device_train_batch_size
    )
    return classification.problem_of("classification", arguments, task, base, TARGET_MODULES, examples)


def main() -> None:
    """See the module."""
    curves.launch(TextArguments, problem)


if __name__ == "__main__":
    run_command(main)
