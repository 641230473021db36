"""GRPO with K LoRA trials on one frozen base: what K runs of `python -m mua_rl.grpo` do, in one process.

The trials share the base, the task and the settings, and differ in learning rate, seed, rank, initialisation and
multiplier (`mua_rl.run.trial.Trial`). Every trial has its own prompts, draws, rewards, gradient norm, optimizer and
schedule, so that it does what it would do alone. Each batch of completions makes one optimizer step.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from trl.trainer.utils import add_fused_lm_head

from mua_rl.adapter.adapters import LoRA, adapter_for
from mua_rl.adapter.groups import learning_rates
from mua_rl.adapter.targets import TargetModules
from mua_rl.envs.tasks import get_task
from mua_rl.grpo.arguments import GRPOArguments
from mua_rl.grpo.base import load_base, load_tokenizer
from mua_rl.grpo.scored import unscored
from mua_rl.grpo.setup import check_vocabulary, splits
from mua_rl.grpo.stacked.checkpoint import Checkpoints
from mua_rl.grpo.stacked.engine import base_on_disk, engine_for
from mua_rl.grpo.stacked.generation import Completions, Decoder, Sampling
from mua_rl.grpo.stacked.gradient import Gradient
from mua_rl.grpo.stacked.memory import (
    TIMES_ONE_RUN,
    BatchLimits,
    StackedMemory,
    StepShape,
    cpu_limits,
    memory_limit,
    plan_limits,
)
from mua_rl.grpo.stacked.prompts import prompt_order
from mua_rl.grpo.stacked.scoring import Metrics, ScoredCompletions, Scoring
from mua_rl.grpo.stacked.settings import check, check_base, device_of
from mua_rl.grpo.stacked.stack import LoRAStack
from mua_rl.grpo.stacked.state import ROLE, TrialState
from mua_rl.grpo.trainer import RunCallback
from mua_rl.lm.generation import end_ids
from mua_rl.lm.heldout import HeldOutResult, score
from mua_rl.lm.text import is_conversational, prompt_ids
from mua_rl.rollouts.memory import PolicySize
from mua_rl.run.judge import why_no_learning
from mua_rl.run.trial import Trial, TrialResult

OnStep = Callable[[int, dict[int, Metrics]], None]
"""What is called after each step with its number, from 1, and the metrics of each trial that took it."""
KeepGoing = Callable[[Trial, list[Metrics]], str | None]
"""Why a trial shall end early, given its metrics so far; `None` lets it go on."""


class StackedTrainer:
    """Trains LoRA trials together.

    Args:
        arguments: The arguments of a single run; the learning rate, seed and run folder in them have no effect.
        trials: The trials.
        target_modules: Which layers carry LoRA.
        start_from: The folder of a run whose policy to start from.
        memory: What the trials may take together on a GPU, in units of what one run takes (`memory_limit`).
        limits: How much is done at once; `None`: as much as `memory` allows.

    Attributes:
        stack: The trials' A and B.
        states: The trials that still train, in the order of the stack's rows.
        ended: The results of the others, by their numbers.
        phases: Seconds spent so far on generation, rewards and the update.

    Raises:
        UserError: Stacked trials do not know what was asked; the message says to run singly.
    """

    def __init__(
        self,
        arguments: GRPOArguments,
        trials: Sequence[Trial],
        target_modules: TargetModules = "mlp",
        start_from: str | None = None,
        memory: float = TIMES_ONE_RUN,
        limits: BatchLimits | None = None,
    ) -> None:
        check(arguments, trials, memory)
        self.arguments, self.trials = arguments, list(trials)
        self.task = get_task(arguments.task, arguments.bad_rows, arguments.isolation)
        self.device = device_of(arguments)
        self.tokenizer = load_tokenizer(arguments)
        model, self.base = load_base(arguments, start_from)
        on_disk = base_on_disk(model, self.tokenizer) if arguments.use_vllm else None
        self.model = model.to(self.device)  # type: ignore[arg-type]
        check_base(self.model, arguments.disable_dropout)
        base_bytes = sum(weight.nbytes for weight in self.model.parameters())
        rows = splits(self.task, is_conversational(self.tokenizer), arguments.held_out_problems)
        check_vocabulary(model, self.tokenizer, rows)
        self.train_rows, self.held_out_rows = rows
        adapters = [adapter_for(trial.spec, target_modules) for trial in trials]
        seeds = [trial.seed for trial in trials]
        self.stack = LoRAStack(self.model, [adapter for adapter in adapters if isinstance(adapter, LoRA)], seeds)
        self.sampling = Sampling(
            end_ids(self.model, self.tokenizer),
            self.tokenizer.pad_token_id,
            arguments.max_completion_length or self.task.max_completion_length,
            arguments.temperature,
        )
        self._prepare_forward()
        assert arguments.generation_batch_size and arguments.num_generations and arguments.per_device_train_batch_size
        prompts = arguments.generation_batch_size // arguments.num_generations
        self.states = [self._begin_trial(number, trial, prompts) for number, trial in enumerate(trials)]
        used = sorted({number for state in self.states for step in state.order for number in step})
        train_rows, self.prompts = self._read(self.train_rows, used)
        self.scoring = Scoring(self.task, train_rows, arguments, self.tokenizer, self.sampling)
        _, self.problems = self._read(self.held_out_rows, range(len(self.held_out_rows)))
        longest_prompt = max(map(len, [*self.prompts.values(), *self.problems.values()]))
        self.shape = StepShape(
            len(trials),
            prompts,
            arguments.num_generations,
            longest_prompt + self.sampling.new_tokens,
            arguments.per_device_train_batch_size,
            2 if arguments.bf16 else self.model.dtype.itemsize,
        )
        self.size = PolicySize.of(self.model)
        one_base = replace(self.size, frozen_bytes=base_bytes, trained=self.size.trained // len(trials))
        self.one_run = self.shape.one_run(one_base)
        if limits is None and self.device.type == "cuda":
            limits = plan_limits(self.size, self.shape, memory_limit(self.size, self.shape, self.one_run, memory))
        self.limits = limits or cpu_limits(self.shape)
        self.engine = None
        if on_disk:
            self.limits = replace(self.limits, completions=0)  # the engine generates them all, in memory of its own
            dtype = torch.bfloat16 if arguments.bf16 else self.model.dtype
            share = arguments.vllm_gpu_memory_utilization
            self.engine = engine_for(self.model, self.stack, self.shape, self.base.fingerprint, dtype, on_disk, share)
        self.decoder = Decoder(
            self.model,
            self.sampling,
            self.limits.completions,
            longest_prompt,
            torch.bfloat16 if arguments.bf16 else None,
        )
        self.gradient = Gradient(self.model, arguments, self.limits.tokens, self.sampling.pad_id)
        self.ended: dict[int, TrialResult] = {}
        self.phases = {"generation": 0.0, "rewards": 0.0, "update": 0.0}

    @property
    def expected_memory(self) -> StackedMemory:
        """Bytes that the trials take, as planned."""
        return StackedMemory.of(self.size, self.shape, self.limits)

    def train(
        self,
        on_step: OnStep | None = None,
        keep_going: KeepGoing | None = None,
        checkpoints: Checkpoints | None = None,
    ) -> list[TrialResult]:
        """Train to the end.

        Args:
            on_step: See `OnStep`.
            keep_going: Asked after each step whether a trial shall go on.
            checkpoints: Where the trials go on from, and are written on the way.

        Returns:
            The trials' results, in order. A trial whose gradient, or policy, is not finite in three steps in a row has
            diverged; it leaves the batch, as does one that `keep_going` ends or that cannot learn any more
            (`mua_rl.run.judge`).

        Raises:
            Unscored: No step of any trial could teach anything.
        """
        with self._shared_time():
            taken, before = self._begin(checkpoints)
        for step in range(taken + 1, self.arguments.max_steps + 1):
            if not self.states:
                break
            with self._shared_time():
                metrics = self.step()
            if on_step:
                on_step(step, metrics)
            self._end_early(before, keep_going)
            if checkpoints:
                checkpoints.save(step, before, self.states, self.ended, self.stack)
        self._check_learnt()
        with self._shared_time():
            after = self.measure()
        self.ended |= {
            state.number: state.result(before, result) for state, result in zip(self.states, after, strict=True)
        }
        return [self.ended[number] for number in range(len(self.trials))]

    def step(self) -> dict[int, Metrics]:
        """Take one optimizer step of every trial; returns the metrics of each, which go to its history too."""
        scored = self._roll_out([state.order[len(state.history)] for state in self.states])
        start = time.perf_counter()
        self.stack.gradients.zero_()
        losses = torch.zeros(len(self.states), device=self.device)
        for batch in self.gradient.passes(scored):
            losses += self.gradient.backward(batch)
        norms = torch.linalg.vector_norm(self.stack.gradients, dim=1)
        if self.arguments.max_grad_norm > 0:  # as torch.nn.utils.clip_grad_norm_
            self.stack.gradients *= (self.arguments.max_grad_norm / (norms + 1e-6)).clamp(max=1.0)[:, None]
        norms, losses = norms.cpu(), losses.cpu()
        finite = scored.completions.finite & norms.isfinite()
        mismatches = self.gradient.mismatches(first=not self.states[0].history)
        for k, (state, metrics) in enumerate(zip(self.states, scored.metrics, strict=True)):
            metrics |= {"loss": float(losses[k]), "grad_norm": float(norms[k])} | (mismatches[k] if mismatches else {})
            metrics["learning_rate"] = learning_rates(state.optimizer)[ROLE]
            if not finite[k]:
                metrics["gradient_not_finite"] = 1.0
            state.step(self.stack.gradients[k], bool(finite[k]))
            state.history.append(metrics)
        self.phases["update"] += time.perf_counter() - start
        return {state.number: metrics for state, metrics in zip(self.states, scored.metrics, strict=True)}

    def measure(self, shared: bool = False) -> list[HeldOutResult]:
        """Measure the held-out accuracy of each trial, greedily.

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

    def _prepare_forward(self) -> None:
        """Let the model compute in the precision that was asked for, and log-probs without whole logits."""
        if self.arguments.bf16:
            self._precast()
        add_fused_lm_head(self.model, temperature=self.arguments.temperature)
        if self.arguments.bf16:
            # No weight is used twice in a pass, and a cached cast would be outside of a captured graph.
            autocast = torch.autocast(self.device.type, torch.bfloat16, cache_enabled=False)
            self.model.forward = autocast(self.model.forward)

    def _precast(self) -> None:
        """Cast the frozen linear weights to what autocast would cast them to in every pass. The output layer stays, as
        it may be the embedding too."""
        output = self.model.get_output_embeddings()
        for module in self.model.modules():
            if isinstance(module, nn.Linear) and module is not output:
                module.to(torch.bfloat16)

    def _begin_trial(self, number: int, trial: Trial, prompts: int) -> TrialState:
        shuffle = bool(self.arguments.shuffle_dataset)
        order = list(prompt_order(self.train_rows, prompts, self.arguments.max_steps, trial.seed, shuffle))
        return TrialState.begin(number, trial, order, self.stack.values[number], self.arguments)

    def _read(self, rows: Dataset, numbers: Sequence[int]) -> tuple[dict[int, dict], dict[int, list[int]]]:
        """Some rows of a split, and the token ids of their prompts, by number."""
        selected = rows.select(numbers).to_list()
        ids = prompt_ids(self.tokenizer, [row["prompt"] for row in selected], **self.arguments.template)
        return dict(zip(numbers, selected, strict=True)), dict(zip(numbers, ids, strict=True))

    def _complete(self, prompts: list[list[list[int]]], copies: int = 1, sampled: bool = False) -> Completions:
        """Complete prompts of each trial, greedily or with the trial's own draws, on the CPU."""
        generators = [state.generator for state in self.states] if sampled else None
        if self.engine is None:
            return self.decoder.complete(prompts, copies, generators)
        return self.engine.complete(self.stack, self.sampling, prompts, copies, generators)

    def _roll_out(self, numbers: list[list[int]]) -> ScoredCompletions:
        """Complete and score one step's prompts of each trial, given by their rows."""
        start = time.perf_counter()
        prompts = [[self.prompts[i] for i in trial] for trial in numbers]
        completions = self._complete(prompts, self.scoring.group, sampled=True)
        generated = time.perf_counter()
        scored = self.scoring.score(numbers, prompts, completions)
        self.phases["generation"] += generated - start
        self.phases["rewards"] += time.perf_counter() - generated
        return scored

    @contextmanager
    def _shared_time(self) -> Iterator[None]:
        """Share the time that is spent here among the trials."""
        start = time.perf_counter()
        yield
        for state in self.states:
            state.seconds += (time.perf_counter() - start) / len(self.states)

    def _begin(self, checkpoints: Checkpoints | None) -> tuple[int, float]:
        """Put trials where checkpoints have them; how many steps they have taken, and the accuracy before the first."""
        loaded = checkpoints.load() if checkpoints else None
        if not loaded:
            return 0, self.measure(shared=True)[0].accuracy
        for state, checkpoint in zip(self.states, loaded, strict=True):
            if checkpoint.outcome:
                self.ended[state.number] = TrialResult.from_dict(checkpoint.outcome)
            elif checkpoint.state:
                state.load_state_dict(self.stack, checkpoint.state)
        self._let_go()
        return loaded[0].step, loaded[0].before

    def _end_early(self, before: float, keep_going: KeepGoing | None) -> None:
        """End trials that have diverged, cannot learn any more, or shall not go on."""
        patience = self.arguments.patience
        for state in self.states:
            steps = len(state.history)
            if state.bad_steps == RunCallback.PATIENCE:
                reason = f"the gradient was not finite in {RunCallback.PATIENCE} steps in a row, up to step {steps}"
                self.ended[state.number] = TrialResult.of_divergence(before, steps, state.seconds, reason)
            elif steps < self.arguments.max_steps:
                reason = why_no_learning(state.history, patience) if patience else ""
                if reason := reason or (keep_going and keep_going(state.trial, state.history)) or "":
                    self.ended[state.number] = state.result(before, None, reason)
        if len(self.ended) == len(self.states) == len(self.trials):  # all at once
            self._check_learnt()
        self._let_go()

    def _check_learnt(self) -> None:
        """Refuse a group in which no step of any trial could teach anything, which is not the learning rates' fault.

        Raises:
            Unscored: There was no such step.
        """
        history = [metrics for state in self.states for metrics in state.history]
        steps = max((len(state.history) for state in self.states), default=0)
        if fault := unscored(self.task, self.arguments, steps, history):
            raise fault

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
    on_step: OnStep | None = None,
    keep_going: KeepGoing | None = None,
    adapters: Path | None = None,
    checkpoints: Path | None = None,
    **options: Any,
) -> list[TrialResult]:
    """Train trials together and return the result of each, in order.

    Args:
        arguments, trials, target_modules: See `StackedTrainer`.
        on_step, keep_going: See `StackedTrainer.train`.
        adapters: Where the trials that reach the end are written, as the PEFT adapters `trial-0`, `trial-1`, …
        checkpoints: The folder of checkpoints, from which trials go on that were cut off; `None`: there are none.
        options: Further options of `StackedTrainer`.

    Raises:
        UserError: See `StackedTrainer`.
    """
    trainer = StackedTrainer(arguments, trials, target_modules, **options)
    files = None
    if checkpoints:
        files = Checkpoints(checkpoints, arguments, trials, target_modules, trainer.base.fingerprint)
    results = trainer.train(on_step, keep_going, files)
    if adapters:
        for number in trainer.stack.active:
            trainer.stack.save_adapter(number, adapters / f"trial-{number}")
    if files:
        files.remove()
    return results
