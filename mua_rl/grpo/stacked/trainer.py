"""GRPO with K LoRA trials side by side on one frozen base: what K runs of `python -m mua_rl.grpo` do, in one process.

The trials share the base, the task and the settings, and differ in learning rate, seed, rank, initialisation and
multiplier (`mua_rl.run.trial.Trial`). Every trial has its own prompts, draws, rewards, gradient norm, optimizer and
schedule, so that it does what it would do alone. Each batch of completions makes one optimizer step.
"""

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn
from transformers import get_scheduler
from trl.trainer.utils import RepeatSampler, add_fused_lm_head

from mua_rl.adapter.adapters import LoRA, adapter_for
from mua_rl.adapter.groups import learning_rates
from mua_rl.adapter.targets import TargetModules
from mua_rl.envs.tasks import get_task
from mua_rl.errors import UserError
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.base import load_base, load_tokenizer
from mua_rl.grpo.scored import unscored
from mua_rl.grpo.setup import check_number, check_vllm, check_vocabulary, splits
from mua_rl.grpo.stacked.checkpoint import Checkpoints
from mua_rl.grpo.stacked.engine import EngineSettings, StackedEngine, engine, gpu_share
from mua_rl.grpo.stacked.generation import Answers, Decoder
from mua_rl.grpo.stacked.gradient import Gradient
from mua_rl.grpo.stacked.memory import (
    TIMES_ONE_RUN,
    Parts,
    StackedMemory,
    Work,
    arms_memory,
    cpu_parts,
    memory_limit,
    one_run,
    plan_parts,
)
from mua_rl.grpo.stacked.scoring import Metrics, Rollout, Scoring
from mua_rl.grpo.stacked.settings import check, check_attention, check_dropout, device_of
from mua_rl.grpo.stacked.stack import LoRAStack
from mua_rl.grpo.stacked.state import StackedTrial
from mua_rl.grpo.trainer import RunCallback
from mua_rl.lm.heldout import HeldOutResult, end_ids, score
from mua_rl.lm.text import is_conversational, prompt_ids
from mua_rl.rollouts.memory import PolicySize
from mua_rl.rollouts.sync import leave_uncompiled
from mua_rl.run.trial import Trial, TrialResult

KeepGoing = Callable[[Trial, list[Metrics]], str | None]
"""Why a trial shall end early, given its metrics so far; `None` lets it go on."""

ROLE = "lora"


class SideBySide:
    """Trains trials side by side.

    Args:
        arguments: As for a single run; its learning rate, seed and run folder have no meaning here.
        trials: LoRA trials.
        target_modules: Which layers carry LoRA.
        start_from: Folder of a run whose policy to start from.
        memory: What the trials may take together on a GPU, in units of what one run takes (`memory_limit`).
        parts: In which parts they work; `None`: as `memory` allows.

    Attributes:
        stack: The trials' A and B.
        states: The trials that still train, in the order of the stack's rows.
        phases: Seconds spent so far on generation, rewards and the update.

    Raises:
        UserError: See `mua_rl.grpo.stacked.settings.check`; the message says to run singly.
    """

    def __init__(
        self,
        arguments: GRPOArguments,
        trials: Sequence[Trial],
        target_modules: TargetModules = "mlp",
        start_from: str | None = None,
        memory: float = TIMES_ONE_RUN,
        parts: Parts | None = None,
    ) -> None:
        check(arguments, trials)
        if not 0 < memory < math.inf:
            raise UserError(f"the memory of trials side by side is a number of runs' above 0, not {memory}.")
        if arguments.use_vllm:
            check_vllm()
        self.arguments, self.trials = arguments, list(trials)
        self.task = get_task(arguments.task, arguments.bad_rows, arguments.isolation)
        self.device = device_of(arguments)
        self.tokenizer = load_tokenizer(arguments)
        model, self.base = load_base(arguments, start_from)
        written = self._write(model) if arguments.use_vllm and not model.name_or_path else None
        self.model = model.to(self.device)  # type: ignore[arg-type]
        check_attention(self.model)
        check_dropout(self.model, arguments.disable_dropout)
        loaded = sum(weight.numel() * weight.element_size() for weight in self.model.parameters())
        self.conversational = is_conversational(self.tokenizer)
        self.train_rows, self.held_out_rows = splits(self.task, self.conversational, arguments.held_out_problems)
        check_vocabulary(model, self.tokenizer, [self.train_rows, self.held_out_rows])
        self.new_tokens = arguments.max_completion_length or self.task.max_completion_length
        adapters = [adapter_for(trial.spec, target_modules) for trial in trials]
        self.stack = LoRAStack(
            self.model, [a for a in adapters if isinstance(a, LoRA)], [trial.seed for trial in trials]
        )
        if arguments.bf16:
            self._precast()
        add_fused_lm_head(self.model, temperature=arguments.temperature)
        self.end_ids = end_ids(self.model, self.tokenizer)
        self.states = [self._new_state(number, trial) for number, trial in enumerate(trials)]
        used = sorted({number for state in self.states for step in state.order for number in step})
        rows, self.prompts = self._read(self.train_rows, used)
        self.scoring = Scoring(self.task, rows, arguments, self.tokenizer, self.end_ids, self.new_tokens)
        _, self.problems = self._read(self.held_out_rows, range(len(self.held_out_rows)))
        self.longest_prompt = max(map(len, [*self.prompts.values(), *self.problems.values()]))
        self.work, self.size = self._work(), PolicySize.of(self.model)
        self.one_run = one_run(
            replace(self.size, frozen_bytes=loaded, trained=self.size.trained // len(trials)), self.work
        )
        if parts is None:
            if self.device.type == "cuda":
                limit = memory_limit(self.size, self.work, self.one_run, memory)
                parts = plan_parts(self.size, self.work, limit)
            else:
                parts = cpu_parts(self.work)
        if arguments.use_vllm:
            parts = replace(parts, completions=0)  # the engine writes them all, in memory of its own
        self.parts = parts
        self.decoder = Decoder(
            self.model, self.end_ids, self.tokenizer.pad_token_id, self.new_tokens, self.autocast, parts.completions
        )
        folder = written.name if written else str(model.name_or_path)
        self.engine = self._start_engine(folder) if arguments.use_vllm else None
        self.gradient = Gradient(self.model, arguments, parts.tokens, self.tokenizer.pad_token_id, self.autocast)
        self.ended: dict[int, TrialResult] = {}
        self.phases = {"generation": 0.0, "rewards": 0.0, "update": 0.0}

    @property
    def prompts_per_step(self) -> int:
        """Prompts of a trial in one optimizer step."""
        assert self.arguments.generation_batch_size and self.arguments.num_generations
        return self.arguments.generation_batch_size // self.arguments.num_generations

    @property
    def expected_memory(self) -> StackedMemory:
        """Bytes that the trials take, as planned."""
        return arms_memory(self.size, self.work, self.parts)

    def autocast(self) -> AbstractContextManager:
        """The context of forward passes."""
        if not self.arguments.bf16:
            return contextlib.nullcontext()
        # No weight is used twice in a pass, and a cached cast would be outside of a captured graph.
        return torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)

    def train(
        self,
        on_step: Callable[[int, dict[int, Metrics]], None] | None = None,
        keep_going: KeepGoing | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> list[TrialResult]:
        """Train to the end.

        Args:
            on_step: Called after each step with its number, from 1, and the metrics of each trial that took it.
            keep_going: Asked after each step whether a trial shall go on.
            checkpoints: Where the trials go on from, and are written on the way.

        Returns:
            What each trial reached, in order. A trial whose gradient, or policy, is not finite in three steps in a row
            has diverged; it leaves the batch, as does one that `keep_going` ends.

        Raises:
            Unscored: No step of any trial could teach anything.
        """
        start = time.perf_counter()
        taken, before = self._begin(checkpoints)
        self._charge(start)
        for step in range(taken + 1, self.arguments.max_steps + 1):
            if not self.states:
                break
            start = time.perf_counter()
            metrics = self.step()
            self._charge(start)
            if on_step:
                on_step(step, metrics)
            self._drop(before, keep_going)
            if checkpoints:
                checkpoints.save(step, before, self.states, self.ended, self.stack)
        history = [metrics for state in self.states for metrics in state.history]
        if fault := unscored(self.task, self.arguments, self.arguments.max_steps, history):
            raise fault
        start = time.perf_counter()
        results = self.measure()
        self._charge(start)
        for state, after in zip(self.states, results, strict=True):
            self.ended[state.number] = state.outcome(before, after)
        return [self.ended[number] for number in range(len(self.trials))]

    def step(self) -> dict[int, Metrics]:
        """One optimizer step of every trial; the metrics of each, which go to its history too."""
        rollout = self._roll_out([state.order[len(state.history)] for state in self.states])
        start = time.perf_counter()
        self.stack.gradients.zero_()
        losses = torch.zeros(len(self.states), device=self.device)
        for batch in self.gradient.passes(rollout):
            losses += self.gradient.backward(batch)
        norms = torch.linalg.vector_norm(self.stack.gradients, dim=1)
        if self.arguments.max_grad_norm > 0:  # as torch.nn.utils.clip_grad_norm_
            self.stack.gradients *= (self.arguments.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)[:, None]
        norms, losses = norms.cpu(), losses.cpu()
        finite = rollout.answers.finite & norms.isfinite()
        mismatches = self.gradient.mismatches(first=not self.states[0].history)
        self.phases["update"] += time.perf_counter() - start
        found = {}
        for k, (state, metrics) in enumerate(zip(self.states, rollout.metrics, strict=True)):
            metrics |= {"loss": float(losses[k]), "grad_norm": float(norms[k])} | (mismatches[k] if mismatches else {})
            metrics["learning_rate"] = learning_rates(state.optimizer)[ROLE]
            if not finite[k]:
                metrics["gradient_not_finite"] = 1.0
            state.bad_steps = 0 if finite[k] else state.bad_steps + 1
            # The optimizer leaves a parameter without gradient alone.
            state.parameter.grad = self.stack.gradients[k] if finite[k] else None
            state.optimizer.step()
            state.schedule.step()
            state.history.append(metrics)
            found[state.number] = metrics
        return found

    def measure(self, shared: bool = False) -> list[HeldOutResult]:
        """Held-out accuracy of each trial, greedy.

        Args:
            shared: The trials are all equal, as at the start, so that each answers a share of the problems: one result.
        """
        trials, count = len(self.states), len(self.problems)
        if not trials:
            return []
        rows = -(-count // trials) if shared else count
        numbers = [[min(k * rows + i, count - 1) if shared else i for i in range(rows)] for k in range(trials)]
        texts = self.scoring.texts(self._complete([[self.problems[i] for i in trial] for trial in numbers]))
        if shared:
            texts = [[text for trial in texts for text in trial]]
        return [score(text[:count], self.task, self.held_out_rows) for text in texts]

    def save_adapter(self, number: int, folder: Path | str) -> None:
        """Write what a trial has learnt as a PEFT adapter, as a run's `adapter/`.

        Raises:
            UserError: The trial has ended early, and its weights are gone.
        """
        if number not in self.stack.active:
            raise UserError(f"trial {number} has ended early, and its adapter is gone.")
        self.stack.save_adapter(number, folder)

    def _work(self) -> Work:
        micro_batch, length = self.arguments.per_device_train_batch_size, self.longest_prompt + self.new_tokens
        assert micro_batch
        compute_bytes = 2 if self.arguments.bf16 else self.model.dtype.itemsize
        return Work(len(self.trials), self.prompts_per_step, self.scoring.group, length, micro_batch, compute_bytes)

    def _write(self, model: Any) -> tempfile.TemporaryDirectory:
        """A base that is on no disk, for the engine to read."""
        folder = tempfile.TemporaryDirectory(prefix="mua_rl-base-")
        model.save_pretrained(folder.name)
        self.tokenizer.save_pretrained(folder.name)
        return folder

    def _start_engine(self, folder: str) -> StackedEngine:
        dtype = torch.bfloat16 if self.arguments.bf16 else self.model.dtype
        settings = EngineSettings.of(self.stack, self.work, self.base.fingerprint, dtype)
        given = self.arguments.vllm_gpu_memory_utilization
        started = engine(settings, folder, lambda: given or gpu_share(self.size, self.work, settings))
        leave_uncompiled(self.model)
        return started

    def _new_state(self, number: int, trial: Trial) -> StackedTrial:
        arguments = self.arguments
        parameter = nn.Parameter(self.stack.values[number])
        optimizer = torch.optim.AdamW(
            [{"params": [parameter], "name": ROLE}],
            lr=trial.learning_rate,
            betas=(arguments.adam_beta1, arguments.adam_beta2),
            eps=arguments.adam_epsilon,
            weight_decay=arguments.weight_decay,
            fused=True,
        )
        schedule = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(arguments.max_steps),
            num_training_steps=arguments.max_steps,
            scheduler_specific_kwargs=dict(arguments.lr_scheduler_kwargs or {}),  # type: ignore[arg-type]
        )
        order = list(
            prompt_order(
                self.train_rows, self.prompts_per_step, arguments.max_steps, trial.seed, bool(arguments.shuffle_dataset)
            )
        )
        return StackedTrial(number, trial, order, torch.Generator().manual_seed(trial.seed), optimizer, schedule)

    def _precast(self) -> None:
        """Cast the frozen linear weights to what autocast would cast them to in every pass. The output layer stays, as
        it may be the embedding too."""
        output = self.model.get_output_embeddings()
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and module is not output:
                module.to(torch.bfloat16)

    def _read(self, rows: Dataset, numbers: Sequence[int]) -> tuple[dict[int, dict], dict[int, list[int]]]:
        """Some rows of a split, and the token ids of their prompts, by number."""
        found = rows.select(numbers).to_list()
        ids = prompt_ids(self.tokenizer, [row["prompt"] for row in found], **self.arguments.template)
        return dict(zip(numbers, found, strict=True)), dict(zip(numbers, ids, strict=True))

    def _pad(self, prompts: list[list[list[int]]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompts of the trials as `(K, p, P)` ids, padded on the left, and their mask."""
        longest = self.longest_prompt if self.decoder.fixed else max(len(ids) for trial in prompts for ids in trial)
        ids = np.full((len(prompts), len(prompts[0]), longest), self.tokenizer.pad_token_id)
        mask = np.zeros_like(ids)
        for k, trial in enumerate(prompts):
            for i, prompt in enumerate(trial):
                ids[k, i, longest - len(prompt) :] = prompt
                mask[k, i, longest - len(prompt) :] = 1
        return torch.from_numpy(ids).to(self.device), torch.from_numpy(mask).to(self.device)

    def _complete(self, prompts: list[list[list[int]]], copies: int = 1, sampled: bool = False) -> Answers:
        """Complete prompts of each trial, greedily or with the trial's own draws, on the CPU."""
        if self.engine is not None:
            seeds = self._draw(torch.randint, 2**62, (len(prompts[0]),)) if sampled else None
            options = self.arguments.temperature, self.end_ids, self.tokenizer.pad_token_id, self.new_tokens
            return self.engine.answer(self.stack, prompts, copies, seeds, *options)
        draws = self._draw(torch.rand, len(prompts[0]) * copies, self.new_tokens) if sampled else None
        answers = self.decoder.answer(*self._pad(prompts), copies, draws, self.arguments.temperature)
        return Answers(answers.tokens.cpu(), answers.lengths.cpu(), answers.finite.cpu())

    def _draw(self, draw: Callable[..., torch.Tensor], *options: Any) -> torch.Tensor:
        """What each trial draws by a function of torch with its own generator."""
        return torch.stack([draw(*options, generator=state.generator) for state in self.states])

    def _roll_out(self, numbers: list[list[int]]) -> Rollout:
        """Complete and score one step's prompts of each trial, given by their rows."""
        start = time.perf_counter()
        prompts = [[self.prompts[i] for i in trial] for trial in numbers]
        answers = self._complete(prompts, self.scoring.group, sampled=True)
        written = time.perf_counter()
        rollout = self.scoring.rollout(numbers, prompts, answers)
        self.phases["generation"] += written - start
        self.phases["rewards"] += time.perf_counter() - written
        return rollout

    def _charge(self, start: float) -> None:
        """Share the time since `start` among the trials."""
        for state in self.states:
            state.seconds += (time.perf_counter() - start) / len(self.states)

    def _begin(self, checkpoints: Checkpoints | None) -> tuple[int, float]:
        """Put trials where checkpoints have them; how many steps they have taken, and the accuracy before the first."""
        found = checkpoints.load() if checkpoints else None
        if not found:
            return 0, self.measure(shared=True)[0].accuracy
        for state, checkpoint in zip(self.states, found, strict=True):
            if checkpoint.outcome:
                self.ended[state.number] = TrialResult.from_dict(checkpoint.outcome)
            elif checkpoint.state:
                state.load_state_dict(self.stack, checkpoint.state)
        self._let_go()
        return found[0].step, found[0].before

    def _drop(self, before: float, keep_going: KeepGoing | None) -> None:
        """End trials that have diverged or shall not go on."""
        for state in self.states:
            steps = len(state.history)
            if state.bad_steps == RunCallback.PATIENCE:
                reason = f"the gradient was not finite in {RunCallback.PATIENCE} steps in a row, up to step {steps}"
                self.ended[state.number] = TrialResult.of_divergence(before, steps, state.seconds, reason)
            elif keep_going and steps < self.arguments.max_steps and (why := keep_going(state.trial, state.history)):
                self.ended[state.number] = state.outcome(before, None, why)
        self._let_go()

    def _let_go(self) -> None:
        """Let the batch have rows for the trials alone that have not ended."""
        going = [state for state in self.states if state.number not in self.ended]
        if len(going) == len(self.states):
            return
        self.decoder.forget()
        self.states = going
        self.stack.keep([state.number for state in going])
        for state, values in zip(going, self.stack.values, strict=True):
            state.parameter.data = values


def train_side_by_side(
    arguments: GRPOArguments,
    trials: Sequence[Trial],
    target_modules: TargetModules = "mlp",
    on_step: Callable[[int, dict[int, Metrics]], None] | None = None,
    keep_going: KeepGoing | None = None,
    start_from: str | None = None,
    adapters: Path | None = None,
    memory: float = TIMES_ONE_RUN,
    checkpoints: Path | None = None,
) -> list[TrialResult]:
    """Train trials side by side and say what each reached, in order.

    Args:
        arguments, trials, target_modules, start_from, memory: As `SideBySide`.
        on_step, keep_going: As `SideBySide.train`.
        adapters: Where the trials that reach the end are written, as the PEFT adapters `trial-0`, `trial-1`, …
        checkpoints: Folder of checkpoints, from which trials go on that were cut off; without them, by default.

    Raises:
        UserError: As `SideBySide`.
    """
    trainer = SideBySide(arguments, trials, target_modules, start_from, memory)
    kept = None
    if checkpoints:
        kept = Checkpoints(checkpoints, arguments, trials, target_modules, trainer.base.fingerprint)
    outcomes = trainer.train(on_step, keep_going, kept)
    if adapters:
        for number in trainer.stack.active:
            trainer.save_adapter(number, adapters / f"trial-{number}")
    if kept:
        kept.remove()
    return outcomes


def prompt_order(rows: Dataset, prompts: int, steps: int, seed: int, shuffle: bool = True) -> Iterator[list[int]]:
    """Rows of the prompts of each step, in the order of a single run with that seed.

    Raises:
        UserError: There are fewer rows than prompts in a step.
    """
    check_number(rows, prompts)
    sampler = RepeatSampler(rows, mini_repeat_count=1, batch_size=prompts, shuffle=shuffle, seed=seed)
    taken = 0
    while taken < steps:
        epoch = list(sampler)
        for start in range(0, len(epoch), prompts):
            if taken < steps:
                yield epoch[start : start + prompts]
            taken += 1
