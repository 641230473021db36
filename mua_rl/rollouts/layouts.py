"""Who holds what on a number of GPUs, what of it fits, and how long a step takes by a roofline: the sums of a plan."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mua_rl.rollouts.memory import GIB, EngineMemory, PolicySize, TrainerMemory, engine_memory, trainer_memory, usable

NODE = 8  # GPUs that NVLink joins
_ENGINE_SEQUENCES = 256  # that vLLM works on at once, unless told otherwise


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU by its maker's data sheet, dense and one way.

    Attributes:
        memory: Bytes.
        flops: bf16 operations a second.
        bandwidth, nvlink, network: Bytes a second of its memory, to its neighbours, and to other machines.
    """

    memory: int
    flops: float
    bandwidth: float
    nvlink: float
    network: float = 50e9


GPUS = {
    "a100": Gpu(80 * GIB, 312e12, 2.0e12, 300e9),
    "h100": Gpu(80 * GIB, 989e12, 3.35e12, 450e9),
    "h200": Gpu(141 * GIB, 989e12, 4.8e12, 450e9),
}


@dataclass(frozen=True)
class Work:
    """An optimizer step: completions, and tokens of a prompt and of a completion."""

    completions: int
    prompt: int
    completion: int

    @property
    def length(self) -> int:
        """Tokens of a whole sequence."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Layout:
    """Who holds what.

    Attributes:
        name: colocated, ddp, fsdp2 or server.
        trainers: Training processes, one GPU each.
        engines, tensor_parallel: vLLM engines, and the GPUs of one.
        sharded: Whether the trainers share weights and optimizer.
    """

    name: str
    trainers: int
    engines: int
    tensor_parallel: int
    sharded: bool

    @property
    def colocated(self) -> bool:
        """Whether engines live on the trainers' GPUs."""
        return self.name != "server"


@dataclass(frozen=True)
class Passes:
    """How a process makes its share of a step: sequences of a pass, passes, and whether activations are recomputed."""

    micro_batch: int
    number: int
    checkpointing: bool


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step by phase, from a roofline: whatever is slower, arithmetic or memory, at a part of its peak.

    Attributes:
        generation: Per token the engine reads its weights and the cache so far, or computes 2 operations a weight.
        training: 6 operations a weight and token in full finetuning, 4 with LoRA, which needs no gradient of the frozen
            weights; 2 more where activations are recomputed.
        communication: DDP's averaging of gradients, FSDP2's gathering of weights for each pass, in either direction.
        sync: What the engine gets: A and B, or every weight.
    """

    generation: float
    training: float
    communication: float
    sync: float

    TRAINING_PEAK = 0.35  # of the GPU's arithmetic
    PREFILL_PEAK = 0.5
    MEMORY_PEAK = 0.6  # of the GPU's memory bandwidth, while decoding
    LINK_PEAK = 0.7
    DECODE_STEP_S = 0.004  # of vLLM and Python for each token of a batch, whatever its size

    @property
    def seconds(self) -> float:
        """Seconds of a step: gradients and the next layer's weights travel while the GPU computes."""
        return self.generation + max(self.training, self.communication) + self.sync


@dataclass(frozen=True)
class Outcome:
    """What a layout comes to.

    Attributes:
        trainer, engine: Bytes on a GPU of either kind; of the narrowest pass where nothing fits.
        cache: Bytes of KV cache that fit beside them, at most what all of an engine's sequences want.
        passes, estimate: `None` where nothing fits.
    """

    layout: Layout
    trainer: TrainerMemory
    engine: EngineMemory
    cache: int
    passes: Passes | None
    estimate: Estimate | None

    @property
    def needed(self) -> int:
        """Bytes of the fullest GPU."""
        engine = self.engine.weights + self.engine.workspace + self.cache
        return self.trainer.total + engine if self.layout.colocated else max(self.trainer.total, engine)


def layouts(gpus: int, completions: int, size: PolicySize, gpu: Gpu) -> Iterator[Layout]:
    """The layouts to compare on so many GPUs; trainers share a step's completions equally."""
    beside, alone = (_tensor_parallel(size, int(gpu.memory * share), gpus) for share in (0.45, 0.9))
    if gpus == 1:
        yield Layout("colocated", 1, 1, 1, False)
        return
    yield Layout("ddp", gpus, gpus // beside, beside, False)
    yield Layout("fsdp2", gpus, gpus // beside, beside, True)
    for trainers in sorted({gpus // 4, gpus // 2, 3 * gpus // 4} - {0}):
        rest = gpus - trainers
        if completions % trainers == 0 and rest >= alone:
            yield Layout("server", trainers, rest // alone, alone, trainers > 1)


def outcome(size: PolicySize, layout: Layout, work: Work, gpu: Gpu) -> Outcome:
    """The passes of a layout that fit and take the least time."""
    each = work.completions // layout.trainers
    sequences = -(-work.completions // layout.engines)
    engine = engine_memory(size, sequences=min(sequences, _ENGINE_SEQUENCES), tensor_parallel=layout.tensor_parallel)
    room = usable(gpu.memory)
    one, wanted = engine.cache(1, work.length), engine.cache(sequences, work.length)
    fitting, least = [], None
    for checkpointing in (False, True):
        for micro_batch in [each // number for number in range(1, each + 1) if each % number == 0]:
            share: dict[str, Any] = {
                "processes": layout.trainers,
                "sharded": layout.sharded,
                "checkpointing": checkpointing,
            }
            trainer = trainer_memory(size, micro_batch=micro_batch, length=work.length, **share)
            left = room - engine.weights - engine.workspace - (trainer.total if layout.colocated else 0)
            if left >= one and trainer.total <= room:
                passes, cache = Passes(micro_batch, each // micro_batch, checkpointing), min(wanted, left)
                seconds = estimate(size, layout, passes, work, gpu, cache // one)
                fitting.append(Outcome(layout, trainer, engine, cache, passes, seconds))
            least = Outcome(layout, trainer, engine, one, None, None)
    assert least is not None
    return min(fitting, key=lambda o: o.estimate.seconds if o.estimate else math.inf, default=least)


def best(outcomes: list[Outcome]) -> Outcome | None:
    """The fastest that fits; of those within a twentieth of it the first, which is the simplest."""
    fitting = [(o, o.estimate.seconds) for o in outcomes if o.estimate is not None]
    if not fitting:
        return None
    fastest = min(seconds for _, seconds in fitting)
    return next(o for o, seconds in fitting if seconds <= 1.05 * fastest)


def estimate(size: PolicySize, layout: Layout, passes: Passes, work: Work, gpu: Gpu, concurrent: int) -> Estimate:
    """The roofline of a layout.

    Args:
        size, layout, passes, work, gpu: What runs where.
        concurrent: Sequences that an engine's cache has room for at once.
    """
    sequences = -(-work.completions // layout.engines)
    batch = min(sequences, concurrent, _ENGINE_SEQUENCES)
    gpus = layout.tensor_parallel
    reads = 2 * size.parameters + batch * (work.prompt + work.completion / 2) * size.kv_token(2)
    step = max(
        reads / (gpu.bandwidth * Estimate.MEMORY_PEAK),
        2 * size.parameters * batch / (gpu.flops * Estimate.PREFILL_PEAK),
    )
    decode = (step / gpus + Estimate.DECODE_STEP_S) * work.completion * math.ceil(sequences / batch)
    prefill = 2 * size.parameters * sequences * work.prompt / (gpu.flops * Estimate.PREFILL_PEAK * gpus)

    operations = (6 if size.full else 4) + (2 if passes.checkpointing else 0)
    tokens = work.completions * work.length / layout.trainers
    training = operations * size.parameters * tokens / (gpu.flops * Estimate.TRAINING_PEAK)

    link = (gpu.nvlink if layout.trainers <= NODE else gpu.network) * Estimate.LINK_PEAK
    others = (layout.trainers - 1) / layout.trainers
    moved = 2 * 4 * size.trained * others  # all-reduce, fp32
    if layout.sharded:
        gathers = 3 if passes.checkpointing else 2
        moved = (gathers * 2 * size.parameters + 4 * size.trained) * others * passes.number
    sync = 2 * (size.parameters if size.full else size.trained) / link
    return Estimate(decode + prefill, training, moved / link, sync)


def _tensor_parallel(size: PolicySize, room: int, gpus: int) -> int:
    """The fewest GPUs, a power of two and no more than a node, over which an engine's weights leave room."""
    number = 1
    while 2 * size.parameters / number > room and 2 * number <= min(gpus, NODE):
        number *= 2
    return number
