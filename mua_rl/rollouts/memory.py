"""How a GPU is shared between a policy in training and the vLLM engine beside it: planned before the engine starts.

Plain arithmetic on sizes, so that a run that does not fit says so with its numbers, before it has loaded anything onto
the GPU, instead of running out of memory in the middle.
"""

from dataclasses import asdict, dataclass
from typing import Any

from mua_rl.errors import UserError

GIB = 2**30
_ENGINE_WORKSPACE = 2 * GIB  # CUDA graphs, kernels' scratch, and the CUDA context's growth
_ENGINE_SPARE = 4 * GIB  # on top where nobody else needs it: what the engine does not need for work becomes cache
_HEAD_TOKENS, _HEAD_TOKEN_IDS = 4096, 32768  # of the tile of logits that TRL holds at once (`trl.kernels`)
_ENGINE_BATCH_TOKENS = 4096  # `max_num_batched_tokens` as TRL sets it
_KV_BLOCK = 16  # tokens; vLLM gives out its cache in blocks
_SAFE = 0.95
_FP32 = 4


@dataclass(frozen=True)
class PolicySize:
    """What memory depends on.

    Attributes:
        frozen_bytes: Weights that are not trained.
        parameters: All weights of the base, counted.
        trained: Weights that are trained, counted.
        layers, hidden, intermediate, vocabulary: The decoder's shape.
        kv_width: Key heads × size of a head.
        attention: Heads × size of a head; `None`: as `hidden`.
    """

    frozen_bytes: int
    parameters: int
    trained: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int
    attention: int | None = None

    @property
    def full(self) -> bool:
        """Whether every weight is trained."""
        return self.frozen_bytes == 0

    @property
    def attention_width(self) -> int:
        """Heads × size of a head."""
        return self.attention or self.hidden

    @property
    def linear(self) -> int:
        """Weights of the linear layers of all decoder layers, counted."""
        attention = 2 * self.hidden * (self.attention_width + self.kv_width)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def kv_token(self, compute_bytes: int) -> int:
        """Bytes of the keys and values of one token in all layers."""
        return 2 * self.layers * self.kv_width * compute_bytes

    @classmethod
    def of(cls, model: Any) -> "PolicySize":
        """The sizes of a language model with its adapter attached."""
        config = model.config.get_text_config()
        parameters = list(model.parameters())
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        packed = [getattr(p, "quant_state", None) for p in parameters]  # of 4-bit weights, two to a byte
        everything = sum(q.shape.numel() if q else p.numel() for p, q in zip(parameters, packed, strict=True))
        return cls(
            frozen_bytes=sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad),
            parameters=everything if trained == everything else everything - trained,
            trained=trained,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", 4 * config.hidden_size),
            kv_width=getattr(config, "num_key_value_heads", heads) * head,
            vocabulary=config.vocab_size,
            attention=heads * head,
        )


@dataclass(frozen=True)
class TrainerMemory:
    """Bytes of one training process at its peak, at the end of a forward pass.

    Attributes:
        weights: Frozen and trained weights.
        gradients: Of the trained weights, in fp32.
        moments: Adam's two, in fp32.
        casts: Copies of fp32 weights in the precision that the trainer computes in.
        activations: What the decoder layers keep for the backward pass.
        head: The tile of logits and what the loss needs beside it, or one layer's gradients where that is more.
    """

    weights: int
    gradients: int
    moments: int
    casts: int
    activations: int
    head: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return asdict(self)


def trainer_memory(
    size: PolicySize,
    *,
    micro_batch: int,
    length: int,
    compute_bytes: int = 2,
    checkpointing: bool = False,
    processes: int = 1,
    sharded: bool = False,
) -> TrainerMemory:
    """What one training process needs.

    The activations are those that autograd keeps in a Llama of transformers with LoRA on the MLP projections, or with
    all weights trained, under autocast, counted with `torch.autograd.graph.saved_tensors_hooks`
    (`tests/test_plan.py`). Gradients are there during the forward pass where a step has several passes.

    Args:
        size: Of the policy.
        micro_batch: Sequences of one forward pass.
        length: Tokens of a sequence, prompt and completion.
        compute_bytes: 2 for bf16 and fp16 (autocast), 4 for fp32.
        checkpointing: Whether activations are recomputed.
        processes: Training processes; several keep a second copy of the gradients (DDP's buckets), or share.
        sharded: Whether they share weights, gradients and moments (FSDP2, ZeRO-3).
    """
    tokens = micro_batch * length
    mixed = compute_bytes < _FP32
    wide_base = size.full or size.frozen_bytes >= _FP32 * size.parameters
    # Per token: each norm its input (and its output, for its own weight) in fp32; the linear layers their inputs, one
    # copy each where autocast makes it; attention q, k, v and its output; SiLU's input and output, up, the product.
    norms = 2 * _FP32 * size.hidden * (2 if size.full else 1)
    inputs = compute_bytes * size.hidden * ((5 if size.full else 2) if mixed else (2 if size.full else 1))
    layer = norms + inputs + compute_bytes * 4 * (size.attention_width + size.intermediate)
    residual = (_FP32 if wide_base else compute_bytes) * size.hidden
    kept = size.layers * residual + layer if checkpointing else size.layers * layer
    gradients = size.trained * _FP32
    weights, moments = size.frozen_bytes + gradients, 2 * gradients
    casts = size.linear * compute_bytes if mixed and wide_base else 0
    if casts and checkpointing and not size.full:
        casts //= size.layers  # autocast keeps copies of trained weights alone
    rows = min(_HEAD_TOKENS, tokens)
    columns = min(_HEAD_TOKEN_IDS, size.vocabulary)
    # Final norm in fp32, hidden states and their gradient, the tile, a slice of the head, and the head's new gradient.
    head = tokens * size.hidden * (2 * _FP32 + compute_bytes) + columns * (rows + size.hidden) * compute_bytes
    head += size.vocabulary * size.hidden * _FP32 if size.full else 0
    if sharded:
        gathered = 2 * size.linear // size.layers * compute_bytes
        whole_head = size.vocabulary * size.hidden * (_FP32 if wide_base else compute_bytes)
        reduced = size.linear // size.layers * _FP32 if size.full else 0
        weights, gradients, moments = weights // processes, gradients // processes, moments // processes
        casts = gathered + whole_head + reduced
    elif processes > 1:
        gradients *= 2
    backward = tokens * 3 * size.intermediate * compute_bytes
    return TrainerMemory(weights, gradients, moments, casts, tokens * kept, max(head, backward))


@dataclass(frozen=True)
class EngineMemory:
    """Bytes of a vLLM engine on one GPU.

    Attributes:
        weights: Its weights in the precision it computes in.
        workspace: CUDA graphs, activations of its largest batch, logits.
        kv_token: Keys and values of one token.
    """

    weights: int
    workspace: int
    kv_token: int

    def cache(self, sequences: int, length: int) -> int:
        """The cache for so many sequences of so many tokens at once."""
        blocks = -(-length // _KV_BLOCK)
        return sequences * blocks * _KV_BLOCK * self.kv_token


def engine_memory(
    size: PolicySize, *, sequences: int, compute_bytes: int = 2, tensor_parallel: int = 1
) -> EngineMemory:
    """What an engine needs on each of the GPUs that it is spread over.

    Args:
        size: Of the policy.
        sequences: Generated at once.
        compute_bytes: 2 for bf16 and fp16, 4 for fp32.
        tensor_parallel: GPUs of one engine; weights and cache are spread over them.
    """
    logits = 3 * _FP32 * size.vocabulary * sequences
    batch = _ENGINE_BATCH_TOKENS * 4 * (size.hidden + size.intermediate) * compute_bytes
    return EngineMemory(
        size.parameters * compute_bytes // tensor_parallel,
        _ENGINE_WORKSPACE + logits + batch,
        size.kv_token(compute_bytes) // tensor_parallel,
    )


@dataclass(frozen=True)
class Plan:
    """How trainer and engine share a GPU.

    Attributes:
        trainer: The trainer's bytes.
        engine_memory: The engine's bytes.
        cache: Bytes of vLLM's KV cache.
        total: Bytes of the GPU.
        roomy: Whether every sequence has its cache at once.
    """

    trainer: TrainerMemory
    engine_memory: EngineMemory
    cache: int
    total: int
    roomy: bool

    @property
    def weights(self) -> int:
        """The trainer's frozen and trained weights."""
        return self.trainer.weights

    @property
    def optimizer(self) -> int:
        """Gradients and Adam's two moments."""
        return self.trainer.gradients + self.trainer.moments

    @property
    def activations(self) -> int:
        """What one forward pass keeps for the backward pass, casts and a tile of logits included."""
        return self.trainer.casts + self.trainer.activations + self.trainer.head

    @property
    def engine(self) -> int:
        """vLLM's weights and workspace."""
        return self.engine_memory.weights + self.engine_memory.workspace

    @property
    def utilization(self) -> float:
        """vLLM's `gpu_memory_utilization`: its share of the whole GPU."""
        return (self.engine + self.cache) / self.total

    def __str__(self) -> str:
        sizes = (self.weights, self.optimizer, self.activations, self.engine, self.cache)
        names = ("weights", "optimizer", "activations", "vLLM", "KV cache")
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in zip(names, sizes, strict=True)) + " GiB"


def usable(free: int) -> int:
    """What can be counted on of so many free bytes: the CUDA context takes some, and fragments."""
    return int(free * _SAFE)


def plan(
    size: PolicySize,
    *,
    total: int,
    free: int,
    micro_batch: int,
    sequences: int,
    length: int,
    longest: int,
    compute_bytes: int = 2,
    sleeps: bool = False,
    **share: Any,
) -> Plan:
    """The shares of a GPU that holds trainer and engine.

    Args:
        size: The sizes of the policy.
        total: Bytes of the GPU.
        free: Bytes of it that nobody has taken, before the policy is moved to it.
        micro_batch: Sequences of one forward pass of the trainer.
        sequences: Sequences that the engine generates at once.
        length: Tokens of a typical sequence, prompt and completion.
        longest: Tokens of the longest sequence that the engine takes.
        compute_bytes: 2 for bf16 and fp16, 4 for fp32.
        sleeps: Whether the engine gives its memory back while the trainer works.
        share: Further arguments of `trainer_memory`.

    Returns:
        A plan with room for all sequences at once, or with as much of the cache as the GPU has left.

    Raises:
        UserError: Not even one longest sequence has room; the message has the numbers and the cures.
    """
    trainer = trainer_memory(size, micro_batch=micro_batch, length=length, compute_bytes=compute_bytes, **share)
    engine = engine_memory(size, sequences=sequences, compute_bytes=compute_bytes)
    needed = engine.cache(1, longest)
    wanted = max(engine.cache(sequences, length), needed)
    empty = Plan(trainer, engine, 0, total, roomy=False)
    working = empty.weights + empty.optimizer + (0 if sleeps else empty.activations)
    left = usable(free) - working - empty.engine
    cache = min(wanted, left) + min(_ENGINE_SPARE, max(0, left - wanted) // 2)
    shares = Plan(trainer, engine, max(cache, needed), total, roomy=cache >= wanted)
    if left < needed:
        short = (needed - left) / GIB
        raise UserError(
            f"trainer and vLLM do not fit on this GPU: {shares} are needed, {free / GIB:.1f} of {total / GIB:.1f} GiB "
            f"are free, {short:.1f} GiB too little. Cures: a smaller --per_device_train_batch_size, "
            "--gradient_checkpointing true, --dtype bfloat16, --vllm_max_model_length, --vllm_enable_sleep_mode true, "
            "or --vllm_mode server."
        )
    return shares
