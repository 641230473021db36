"""Supervised finetuning: the learning-rate curves of LoRA and of full finetuning with TRL's `SFTTrainer` (issue 10).

Without flags it needs neither hub nor GPU: the embedded model, which has only seen sums and products, learns
differences. With a learning rate it is one run, whose policy GRPO starts from:

    python scripts/finetune_text.py --lr 0.002 --output_dir runs/sft
    python -m mua_rl.grpo --start_from runs/sft

Any task of `mua_rl.envs.tasks` with answers will do, in the form that its reward reads:

    python scripts/finetune_text.py --model smollm2 --task reasoning-gym:number_sorting \\
        --completion '<answer>{answer}</answer>'

So will a data set of the hub or a JSONL file, with the columns `prompt` and `completion`, `messages` (of which every
turn of the assistant is learnt) or `text`. The paper's two cases:

    python scripts/finetune_text.py --model meta-llama/Llama-3.2-1B --tokenizer_name meta-llama/Llama-3.2-1B-Instruct \\
        --dataset_name allenai/tulu-3-sft-mixture --dataset_train_split 'train[:50000]' --max_steps 1000 \\
        --max_length 2048 --per_device_train_batch_size 4 --gradient_accumulation_steps 16 --ranks 4 16 64 256 full
    python scripts/finetune_text.py --model Qwen/Qwen2.5-3B --dataset_name open-thoughts/OpenThoughts-114k \\
        --dataset_train_split 'train[:50000]' --max_steps 1000 --max_length 4096 --per_device_train_batch_size 2 \\
        --gradient_accumulation_steps 32 --gradient_checkpointing --ranks 4 16 64 256 full

The metric is minus the loss per token of the completions of held-out examples.
"""

from dataclasses import dataclass, field

import curves
import data_sets
from datasets import Dataset
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from mua_rl.envs.tasks import get_task
from mua_rl.errors import UserError, one_line
from mua_rl.exits import run_command
from mua_rl.lm import models
from mua_rl.lm.text import is_conversational

FORMATS = (["prompt", "completion"], ["messages"], ["conversations"], ["text"])
"""Columns of a data set that TRL learns from; the first that are there."""


@dataclass
class TextArguments:
    """The base, the data and the length of a run."""

    model: str = field(default=models.EMBEDDED, metadata={"help": "embedded, smollm2, a model folder, or a hub id."})
    tokenizer_name: str | None = field(
        default=None, metadata={"help": "Tokenizer, for a base model without a chat template. Default: the model's."}
    )
    task: str = field(default="differences", metadata={"help": "A task with answers; see mua_rl.envs.tasks."})
    completion: str = field(
        default="{answer}", metadata={"help": "What is learnt to follow a prompt of the task, around its {answer}."}
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "A data set instead of a task: a hub id, or a JSONL file."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Of a data set of the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Of the data set, as in train[:50000]."})
    held_out: int = field(default=256, metadata={"help": "Examples that are kept for the metric, at most."})
    max_steps: int = field(default=60, metadata={"help": "Optimizer steps of a run."})
    per_device_train_batch_size: int = field(default=32, metadata={"help": "Examples of a forward pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Forward passes of an optimizer step."})
    max_length: int = field(default=1024, metadata={"help": "Tokens of an example; what is beyond is cut off."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade compute for memory."})


def find_examples(arguments: TextArguments, conversational: bool) -> tuple[Dataset, Dataset]:
    """Training and held-out examples in one of TRL's formats.

    Args:
        conversational: Whether the tokenizer has a chat template.

    Raises:
        UserError: There are none.
    """
    if arguments.dataset_name is None:
        task = get_task(arguments.task)
        train, held_out = (
            _answered(rows, arguments.task, arguments.completion)
            for rows in (task.train(conversational), task.held_out(conversational))
        )
        return train, held_out.select(range(min(arguments.held_out, len(held_out))))
    rows = data_sets.read(arguments.dataset_name, arguments.dataset_train_split, arguments.dataset_config)
    data_sets.check_held_out(arguments.held_out, len(rows))
    columns = data_sets.find_columns(rows, arguments.dataset_name, *FORMATS)
    halves = rows.select_columns(columns).train_test_split(arguments.held_out, seed=0)
    return halves["train"], halves["test"]


def _answered(rows: Dataset, task: str, completion: str) -> Dataset:
    """Prompts of a task with completions; rows without an answer are left out."""
    rows = rows.filter(lambda row: row.get("answer") is not None)
    if not len(rows):
        raise UserError(f"the task {task} has no answers to learn from: choose another, or a --dataset_name.")
    if "{answer}" not in completion:
        raise UserError(f"--completion says where the {{answer}} stands, and {completion!r} does not.")

    def completed(row: dict) -> dict:
        text = completion.replace("{answer}", str(row["answer"]))
        is_text = isinstance(row["prompt"], str)
        return {"completion": text if is_text else [{"role": "assistant", "content": text}]}

    return rows.map(completed).select_columns(["prompt", "completion"])


@dataclass(frozen=True)
class Text:
    """Examples to learn, and those to measure with.

    Attributes:
        tokenizer: Of the model.
        train_rows, held_out_rows: In one of TRL's formats, or tokenized (`input_ids`, `labels`).
    """

    arguments: TextArguments
    tokenizer: PreTrainedTokenizerBase
    train_rows: Dataset
    held_out_rows: Dataset

    def trainer(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        schedule: LRScheduler | None = None,
        seed: int = 0,
    ) -> SFTTrainer:
        """TRL's, silent and saving nothing; it tokenizes examples that are not yet."""
        own, columns = self.arguments, self.train_rows.column_names
        config = SFTConfig(
            **curves.trainer_settings(own.max_steps, own.per_device_train_batch_size, seed),
            gradient_accumulation_steps=own.gradient_accumulation_steps,
            max_length=own.max_length,
            assistant_only_loss="messages" in columns or "conversations" in columns,
            dataset_kwargs={"skip_prepare_dataset": "labels" in columns},
            gradient_checkpointing=own.gradient_checkpointing,
        )
        trainer = SFTTrainer(
            model,
            config,
            train_dataset=self.train_rows,
            eval_dataset=self.held_out_rows,
            processing_class=self.tokenizer,
            optimizers=(optimizer, schedule),
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def tokenized(self, model: nn.Module) -> "Text":
        """The same with tokens for text, made once and not in every run.

        Raises:
            UserError: TRL cannot read the examples, or none fits into `max_length`.
        """
        try:
            trainer = self.trainer(model)
        except (AttributeError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"TRL cannot read these examples: {one_line(error, 300)}") from None
        train_rows, held_out_rows = trainer.train_dataset, trainer.eval_dataset
        if not len(train_rows) or not len(held_out_rows):
            raise UserError("no completion begins within --max_length tokens.")
        return Text(self.arguments, self.tokenizer, train_rows, held_out_rows)

    def train(self, model: nn.Module, optimizer: Optimizer, schedule: LRScheduler, seed: int) -> None:
        """One run; the seed shuffles the examples."""
        self.trainer(model, optimizer, schedule, seed).train()

    def measure(self, model: nn.Module) -> tuple[float, float]:
        """Minus the held-out loss per token, and its standard error over examples."""
        collate = DataCollatorForLanguageModeling(self.tokenizer.pad_token_id)
        batches = DataLoader(self.held_out_rows, self.arguments.per_device_train_batch_size, collate_fn=collate)
        loss_sums, counts = curves.completion_losses(model, batches)
        loss = loss_sums.sum() / counts.sum()
        # Of a ratio of two sums over examples.
        error = (loss_sums - loss * counts).square().sum().sqrt() / counts.sum()
        return -loss.item(), error.item()


def problem_of(arguments: TextArguments) -> curves.Field:
    """The field's problem.

    Raises:
        UserError: The model or the data cannot be had.
    """
    one = ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "max_length")
    curves.check_least(arguments, **dict.fromkeys(one, 1), held_out=2)

    def load() -> nn.Module:
        return models.load_model(arguments.model).to(curves.device())

    tokenizer = models.load_tokenizer(arguments.tokenizer_name or arguments.model)
    text = Text(arguments, tokenizer, *find_examples(arguments, is_conversational(tokenizer))).tokenized(load())
    return curves.Field(
        algorithm="sft",
        task=arguments.dataset_name or arguments.task,
        base=arguments.model,
        target_modules="mlp",
        load=load,
        train=text.train,
        measure=text.measure,
        metric="−(held-out loss per token)",
        steps=arguments.max_steps,
        batch={
            "examples": arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps,
            "max_length": arguments.max_length,
        },
    )


def main() -> None:
    """The command line."""
    curves.silence()
    arguments, adapter_arguments, curve_arguments, given = curves.parse(TextArguments)
    if "task" in given and arguments.dataset_name:
        raise UserError("--task and --dataset_name exclude each other: give one of them.")
    if arguments.dataset_name is None:
        given["task"] = arguments.task  # GRPO's default is another
    curves.run(problem_of(arguments), adapter_arguments, curve_arguments, given)


if __name__ == "__main__":
    run_command(main)
