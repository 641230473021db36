"""How the memory of GRPO trials side by side is shared: planned from what one run would take, before the first step.

Trials share the base, but each has its A, B, gradients and moments, and the completions of all of them have keys and
values at once. So that K trials do not take K times one run's memory, they are completed and trained in parts. Which
parts changes no result but by rounding: a completion depends on its own prompt and draws alone, and gradients add up.
"""

from dataclasses import dataclass, replace

from mua_rl.rollouts.memory import PolicySize, TrainerMemory, trainer_memory

TIMES_ONE_RUN = 1.4
"""Memory of trials side by side in runs, by default; see `memory_limit`."""

CACHE_ALIGNED = 8
"""The length of a fixed cache is a multiple of it, as attention kernels like it."""

_FP32 = 4
_PASS_SHARE = 0.7  # of what weights and optimizers leave, at most, for a forward and backward pass
_CPU_PASS = 1024  # tokens: in wider passes there is more padding, and more memory to be fetched


@dataclass(frozen=True)
class Parts:
    """In which parts trials work.

    Attributes:
        completions: Of each trial, written at once.
        tokens: Of all trials together, in one forward and backward pass.
    """

    completions: int
    tokens: int


@dataclass(frozen=True)
class StackedMemory:
    """Bytes of trials side by side at their peak, which is in a training pass: the cache keeps its place meanwhile.

    Attributes:
        trainer: As for a single run: weights (A and B of all trials with them), gradients, moments, a pass.
        cache: Keys and values of the completions that are written at once.
        logits: After the last token of each of these.
    """

    trainer: TrainerMemory
    cache: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {**self.trainer.parts(), "cache": self.cache, "logits": self.logits}


@dataclass(frozen=True)
class Work:
    """What one optimizer step of each trial is.

    Attributes:
        trials: K.
        prompts: Of a trial.
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


def one_run(loaded: PolicySize, work: Work) -> TrainerMemory:
    """What one trial takes in a run of its own.

    Args:
        loaded: The policy of one run, its base as it is loaded.
        work: Of the trials.
    """
    return trainer_memory(loaded, micro_batch=work.micro_batch, length=work.length, compute_bytes=work.compute_bytes)


def arms_memory(size: PolicySize, work: Work, parts: Parts) -> StackedMemory:
    """What trials take.

    Args:
        size: Of the base as it is here, and of A and B of all trials (`trained`).
        work: Of the trials.
        parts: In which they do it.
    """
    rows = work.trials * parts.completions
    length = -(-work.length // CACHE_ALIGNED) * CACHE_ALIGNED
    trainer = trainer_memory(size, micro_batch=1, length=parts.tokens, compute_bytes=work.compute_bytes)
    casts = (
        size.trained * work.compute_bytes if work.compute_bytes < _FP32 else 0
    )  # of A and B, kept as activations are
    return StackedMemory(
        replace(trainer, casts=trainer.casts + casts),
        rows * length * 2 * size.layers * size.kv_width * work.compute_bytes,
        rows * size.vocabulary * work.compute_bytes,
    )


def memory_limit(size: PolicySize, work: Work, one: TrainerMemory, times: float) -> float:
    """Bytes that trials may take together: `times` what one run takes, or more where their weights need it.

    A, B, gradients and moments of all trials are there anyhow (at r = 256 eight trials of SmolLM2 have 1.4 times what
    one run takes in all); what is left for work is never less than one run has, for in crumbs it takes many times as
    long.

    Args:
        size, work: As `arms_memory` takes them.
        one: See `one_run`.
        times: Above 0.
    """
    own = arms_memory(size, work, Parts(0, 1)).total
    return max(times * one.total, own + one.activations + one.head)


def plan_parts(size: PolicySize, work: Work, limit: float) -> Parts:
    """The largest parts that keep trials within a number of bytes; or the smallest there are.

    A pass has at most the tokens of a single run's, the rest goes to the cache. Prompts are shared evenly among the
    parts, as all parts have the same size.

    Args:
        size, work: As `arms_memory` takes them.
        limit: Bytes.
    """
    fixed = arms_memory(size, work, Parts(0, 1)).total
    token = (arms_memory(size, work, Parts(0, work.one_pass)).total - fixed) / work.one_pass
    left = limit - fixed
    tokens = max(1, min(work.one_pass, int(_PASS_SHARE * left / token)))
    left = limit - arms_memory(size, work, Parts(0, tokens)).total
    prompt = arms_memory(size, work, Parts(work.group, 1)).total - fixed
    at_once = min(work.prompts, max(1, int(left / prompt)))
    number = -(-work.prompts // at_once)
    return Parts(-(-work.prompts // number) * work.group, tokens)


def cpu_parts(work: Work) -> Parts:
    """On a CPU, where programs and not trials are most of a run's memory: all completions at once, in quick passes."""
    return Parts(work.prompts * work.group, _CPU_PASS)
