"""E6 of docs/predictions.md: supervised finetuning with AdamW and with SGD, Init[B] trials side by side.

    python scripts/law_sft.py --optimizer adamw --output runs/law/e6.csv --curve B,4,1:-13:-7:0.5:1+2
    python scripts/law_sft.py --optimizer sgd --output runs/law/e6.csv --curve B,4,1:-10:4:1:1

The answers of a task are learnt: `--steps` steps of 32 examples, warm-up over 5 %, cosine decay to a tenth. AdamW as in
scripts/finetune_text.py (gradients clipped at 1, no weight decay); SGD with momentum 0.9 and unclipped gradients, since
a clipped step has one size again. The metric is minus the held-out loss per token of the answers.
"""

import argparse
import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from law_grpo import curve_trials
from torch import nn
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup

from mua_rl.adapter.adapters import LoRA, adapter_for
from mua_rl.analysis.rows import SweepRow, append
from mua_rl.envs.tasks import get_task
from mua_rl.exits import run_command
from mua_rl.grpo.stacked.prompts import prompt_order
from mua_rl.grpo.stacked.stack import LoRAStack
from mua_rl.lm import models
from mua_rl.lm.text import is_conversational, prompt_ids
from mua_rl.run.machine import machine
from mua_rl.run.trial import Status, Trial, TrialResult, is_clear

EXAMPLES = 32
Example = tuple[list[int], int]
"""Token ids of prompt and answer, and how many of them are the prompt's."""


def examples(tokenizer: Any, rows: Any) -> list[Example]:
    """Of a task's split, answers ending with the end token."""
    prompts = prompt_ids(tokenizer, rows["prompt"])
    answers = tokenizer([str(answer) for answer in rows["answer"]], add_special_tokens=False)["input_ids"]
    return [(p + a + [tokenizer.eos_token_id], len(p)) for p, a in zip(prompts, answers, strict=True)]


class Trainer:
    """Trials side by side on one frozen base, on which every trial sees its own examples."""

    def __init__(self, options: argparse.Namespace, trials: Sequence[Trial]) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.trials, self.options = list(trials), options
        tokenizer, task = models.load_tokenizer(options.model), get_task(options.task)
        model: Any = models.load_model(options.model)
        self.model = model.to(self.device).eval()
        conversational = is_conversational(tokenizer)
        train_rows = task.train(conversational)
        self.train_examples = examples(tokenizer, train_rows)
        self.held_out = examples(tokenizer, task.held_out(conversational))[: options.held_out]
        self.fill = tokenizer.pad_token_id
        adapters = [adapter_for(trial.spec, "mlp") for trial in trials]
        self.stack = LoRAStack(
            self.model, [a for a in adapters if isinstance(a, LoRA)], [trial.seed for trial in trials]
        )
        self.on_gpu = self.device.type == "cuda"
        if self.on_gpu:
            for layer in self.stack.layers.values():
                layer.base.to(torch.bfloat16)
        self.orders = [list(prompt_order(train_rows, EXAMPLES, options.steps, trial.seed)) for trial in trials]
        self.steppers = [self._stepper(k, trial) for k, trial in enumerate(trials)]

    def _stepper(self, k: int, trial: Trial) -> tuple[torch.optim.Optimizer, Any]:
        parameter = nn.Parameter(self.stack.values[k])
        optimizer: torch.optim.Optimizer
        if self.options.optimizer == "sgd":
            optimizer = torch.optim.SGD([parameter], trial.learning_rate, momentum=0.9)
        else:
            optimizer = torch.optim.AdamW([parameter], trial.learning_rate, weight_decay=0.0)
        schedule = get_cosine_with_min_lr_schedule_with_warmup(
            optimizer, round(0.05 * self.options.steps), self.options.steps, min_lr_rate=0.1
        )
        return optimizer, schedule

    def losses(self, rows: Sequence[Sequence[Example]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sums of the losses of each trial's answers, and their tokens, `(K,)` both."""
        flat = [example for trial in rows for example in trial]
        length = max(len(ids) for ids, _ in flat)
        ids = torch.full((len(flat), length), self.fill)
        written = torch.zeros((len(flat), length), dtype=torch.bool)
        for i, (tokens, prompt) in enumerate(flat):
            ids[i, : len(tokens)] = torch.tensor(tokens)
            written[i, prompt - 1 : len(tokens) - 1] = True  # where the next token is the answer's
        labels = ids.roll(-1, 1)[written].to(self.device)
        number = torch.arange(len(rows)).repeat_interleave(len(rows[0]))[:, None].expand_as(ids)[written]
        number = number.to(self.device)
        autocast = torch.autocast("cuda", torch.bfloat16, cache_enabled=False) if self.on_gpu else None
        with autocast or contextlib.nullcontext():  # padding is on the right, where causal attention needs no mask
            hidden = self.model.base_model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state
            logits = self.model.get_output_embeddings()(hidden[written.to(self.device)])
        loss = nn.functional.cross_entropy(logits.float(), labels, reduction="none")
        sums = torch.zeros(len(rows), device=self.device)
        return sums.index_add(0, number, loss), sums.index_add(0, number, torch.ones_like(loss))

    def train(self) -> None:
        """All steps."""
        for step in range(self.options.steps):
            self.stack.gradients.zero_()
            sums, counts = self.losses([[self.train_examples[i] for i in order[step]] for order in self.orders])
            (sums / counts).sum().backward()
            if self.options.optimizer != "sgd":
                norms = torch.linalg.vector_norm(self.stack.gradients, dim=1, keepdim=True)
                self.stack.gradients *= (1 / (norms + 1e-6)).clamp(max=1.0)
            for k, (optimizer, schedule) in enumerate(self.steppers):
                optimizer.param_groups[0]["params"][0].grad = self.stack.gradients[k]
                optimizer.step()
                schedule.step()
            if step % 10 == 0:
                print(f"step {step}: {[round(x, 2) for x in (sums / counts).tolist()]}", flush=True)

    @torch.no_grad()
    def measure(self) -> list[tuple[float, float]]:
        """Minus the held-out loss per token of each trial, and its standard error over parts of 32 examples."""
        sums, counts = [], []
        for start in range(0, len(self.held_out), EXAMPLES):
            piece = self.held_out[start : start + EXAMPLES]
            part_sums, part_counts = self.losses([piece] * len(self.trials))
            sums.append(part_sums)
            counts.append(part_counts)
        s, c = torch.stack(sums), torch.stack(counts)
        loss = s.sum(0) / c.sum(0)
        error = (s - loss * c).square().sum(0).sqrt() / c.sum(0)
        return list(zip((-loss).tolist(), error.tolist(), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--name", default=None, help="of the base in the CSV; default: --model")
    parser.add_argument("--task", default="arithmetic")
    parser.add_argument("--optimizer", choices=["adamw", "sgd"], required=True)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held-out", type=int, default=256)
    parser.add_argument("--curve", action="append", required=True)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    trials = [trial for curve in options.curve for trial in curve_trials(curve)[1]]
    start = time.monotonic()
    trainer = Trainer(options, trials)
    before = trainer.measure()[0][0]
    trainer.train()
    seconds = (time.monotonic() - start) / len(trials)
    base = (options.name or options.model) + ("-sgd" if options.optimizer == "sgd" else "")
    for trial, (score, error) in zip(trials, trainer.measure(), strict=True):
        if math.isfinite(score):
            status = Status.WORSE if is_clear(before - score, error) else Status.OK
            result = TrialResult(score, error, before, score, score, status, "", options.steps, seconds)
        else:
            result = TrialResult.of_divergence(before, options.steps, seconds, "the loss left the finite numbers")
        append(options.output, [SweepRow("sft", options.task, base, trial, result, machine())])
        print(f"{base} {trial.name}: {score:.3f}", flush=True)
    print(f"{len(trials)} runs in {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    run_command(main)
