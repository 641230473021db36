"""How much stacked trials do at once: planned from what one run would take, before the first step.

Trials share the base, but each has its A, B, gradients and moments, and the completions of all of them have keys and
values at once. So that K trials do not take K times one run's memory, they are completed and trained in several
batches. The size of a batch changes no result but by rounding: a completion depends on its own prompt and draws alone,
and gradients add up.
"""

from bisect import bisect_right
from dataclasses import dataclass

from mua_rl.rollouts.memory import PolicySize, TrainerMemory, engine_memory, trainer_memory

TIMES_ONE_RUN = 1.4
"""The memory of stacked trials in units of one run's, by default; see `memory_limit`."""

CACHE_ALIGNED = 8
"""The length of a fixed cache is a multiple of this, as attention kernels prefer."""

_FP32 = 4
_PASS_SHARE = 0.7  # of the memory that weights and optimizers leave, at most, for a forward and backward pass
_CPU_PASS = 1024  # tokens: wider passes have more padding, and fetch more memory


@dataclass(frozen=True)
class StepShape:
    """The shape of one optimizer step.

    Attributes:
        trials: The number of trials K.
        prompts: Prompts of each trial.
        group: Completions per prompt G.
        length: Tokens of the longest prompt and the longest completion together.
        micro_batch: Completions in a pass of a single run.
        compute_bytes: 2 for bf16 (autocast), 4 for fp32.
    """

    trials: int
    prompts: int
    group: int
    length: int
    micro_batch: int
    compute_bytes: int = 2

    @property
    def one_pass(self) -> int:
        """Tokens in a pass of a single run."""
        return self.micro_batch * self.length

    def one_run(self, loaded: PolicySize) -> TrainerMemory:
        """What one trial takes in a run of its own, whose policy has the given size."""
        return trainer_memory(
            loaded, micro_batch=self.micro_batch, length=self.length, compute_bytes=self.compute_bytes
        )


@dataclass(frozen=True)
class BatchLimits:
    """How much stacked trials do at once.

    Attributes:
        completions: The most completions of each trial that are generated at once; 0 where an engine generates them.
        tokens: The most tokens of all trials together in one forward and backward pass.
    """

    completions: int
    tokens: int


@dataclass(frozen=True)
class StackedMemory(TrainerMemory):
    """Bytes of stacked trials at their peak, which is in a training pass: the cache keeps its place meanwhile.

    Attributes:
        cache: Keys and values of the completions that are generated at once.
        logits: The logits after the last token of each of these.
    """

    cache: int
    logits: int

    @classmethod
    def of(cls, size: PolicySize, shape: StepShape, limits: BatchLimits) -> "StackedMemory":
        """What trials take.

        Args:
            size: The size of the base as it is here, with A and B of all trials (`trained`).
            shape: The shape of their steps.
            limits: How much they do at once.
        """
        width, rows = shape.compute_bytes, shape.trials * limits.completions
        trainer = trainer_memory(size, micro_batch=1, length=limits.tokens, compute_bytes=width).parts()
        if width < _FP32:
            trainer["casts"] += size.trained * width  # autocast's copies of A and B are kept as activations are
        length = -(-shape.length // CACHE_ALIGNED) * CACHE_ALIGNED
        kv_token = engine_memory(size, sequences=rows, compute_bytes=width).kv_token
        return cls(**trainer, cache=rows * length * kv_token, logits=rows * size.vocabulary * width)


def memory_limit(size: PolicySize, shape: StepShape, one_run: TrainerMemory, times: float) -> float:
    """Bytes that trials may take together: `times` what one run takes, or more where their weights need it.

    A, B, gradients and moments of all trials are there anyhow (at r = 256 eight trials of SmolLM2 have 1.4 times what
    one run takes in all). What is left for work is never less than one run has, since tiny batches take many times as
    long.

    Args:
        size, shape: See `StackedMemory.of`.
        one_run: See `StepShape.one_run`.
        times: A number above 0.
    """
    resident = StackedMemory.of(size, shape, BatchLimits(0, 1)).total
    return max(times * one_run.total, resident + one_run.activations + one_run.head)


def plan_limits(size: PolicySize, shape: StepShape, limit: float) -> BatchLimits:
    """The largest batches that keep trials within a number of bytes, or the smallest there are.

    A pass has at most the tokens of a single run's pass, and the rest goes to the cache. Prompts are shared evenly
    among the batches, as all batches have the same size.

    Args:
        size, shape: See `StackedMemory.of`.
        limit: The number of bytes.
    """

    def total(prompts: int, tokens: int) -> int:
        return StackedMemory.of(size, shape, BatchLimits(prompts * shape.group, tokens)).total

    resident = total(0, 1)
    for_pass = resident + _PASS_SHARE * (limit - resident)
    tokens = max(1, bisect_right(range(1, shape.one_pass + 1), for_pass, key=lambda tokens: total(0, tokens)))
    at_once = max(1, bisect_right(range(1, shape.prompts + 1), limit, key=lambda prompts: total(prompts, tokens)))
    batches = -(-shape.prompts // at_once)
    return BatchLimits(-(-shape.prompts // batches) * shape.group, tokens)


def cpu_limits(shape: StepShape) -> BatchLimits:
    """On a CPU, where programs and not trials are most of a run's memory: all completions at once, in quick passes."""
    return BatchLimits(shape.prompts * shape.group, _CPU_PASS)
