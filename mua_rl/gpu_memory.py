"""How a GPU is shared between a policy in training and the vLLM engine beside it: planned before the engine starts.

Plain arithmetic on sizes, so that a run that does not fit says so with its numbers, before it has loaded anything onto
the GPU, instead of running out of memory in the middle.
"""

from dataclasses import dataclass
from typing import Any

from mua_rl.errors import UserError

GIB = 2**30
_ENGINE_WORKSPACE = 2 * GIB  # CUDA graphs, kernels' scratch, and the CUDA context's growth
_ENGINE_SPARE = 4 * GIB  # on top where nobody else needs it: what the engine does not need for work becomes cache
_HEAD_CHUNK_TOKENS = 2048  # tokens whose logits the trainer holds at once
_ENGINE_BATCH_TOKENS = 4096  # `max_num_batched_tokens` as TRL sets it
_KV_BLOCK = 16  # tokens; vLLM gives out its cache in blocks
_SAFE = 0.95  # of the free memory: allocators lose some to fragments
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
    """

    frozen_bytes: int
    parameters: int
    trained: int
    layers: int
    hidden: int
    intermediate: int
    kv_width: int
    vocabulary: int

    @classmethod
    def of(cls, model: Any) -> "PolicySize":
        """The sizes of a language model with its adapter attached."""
        config = model.config.get_text_config()
        parameters = list(model.parameters())
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or config.hidden_size // heads
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        everything = sum(p.numel() for p in parameters)
        return cls(
            frozen_bytes=sum(p.numel() * p.element_size() for p in parameters if not p.requires_grad),
            parameters=everything if trained == everything else everything - trained,
            trained=trained,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", 4 * config.hidden_size),
            kv_width=getattr(config, "num_key_value_heads", heads) * head,
            vocabulary=config.vocab_size,
        )


@dataclass(frozen=True)
class Plan:
    """Bytes for each use of a GPU.

    Attributes:
        weights: The trainer's frozen and trained weights.
        optimizer: Gradients and Adam's two moments.
        activations: What one forward pass keeps for the backward pass, and the logits of a chunk.
        engine: vLLM's weights and workspace.
        cache: vLLM's KV cache.
        total: Of the GPU.
        roomy: Whether every sequence has its cache at once.
    """

    weights: int
    optimizer: int
    activations: int
    engine: int
    cache: int
    total: int
    roomy: bool

    @property
    def utilization(self) -> float:
        """vLLM's `gpu_memory_utilization`: its share of the whole GPU."""
        return (self.engine + self.cache) / self.total

    def __str__(self) -> str:
        parts = {
            "weights": self.weights,
            "optimizer": self.optimizer,
            "activations": self.activations,
            "vLLM": self.engine,
            "KV cache": self.cache,
        }
        return ", ".join(f"{name} {size / GIB:.1f}" for name, size in parts.items()) + " GiB"


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
    checkpointing: bool = False,
    sleeps: bool = False,
) -> Plan:
    """The shares of a GPU that holds trainer and engine.

    Args:
        size: Of the policy.
        total: Bytes of the GPU.
        free: Bytes of it that nobody has taken, before the policy is moved to it.
        micro_batch: Sequences of one forward pass of the trainer.
        sequences: Sequences that the engine generates at once.
        length: Tokens of a typical sequence, prompt and completion.
        longest: Tokens of the longest sequence that the engine takes.
        compute_bytes: 2 for bf16 and fp16, 4 for fp32.
        checkpointing: Whether the trainer recomputes activations.
        sleeps: Whether the engine gives its memory back while the trainer works.

    Returns:
        A plan with room for all sequences at once, or with as much of the cache as the GPU has left.

    Raises:
        UserError: Not even one longest sequence has room; the message has the numbers and the cures.
    """
    weights = size.frozen_bytes + size.trained * _FP32
    optimizer = size.trained * _FP32 * 3
    # What a gated decoder layer saves for its backward pass, in values per token: two norms (in fp32, so twice) and
    # their outputs, queries, keys, values, the attention's output, the residual; gate, its activation, up, the product.
    kept = 12 * size.hidden + 4 * size.intermediate
    per_token = (size.layers * size.hidden * 2 + kept) if checkpointing else size.layers * kept
    head = 3 * _FP32 * size.vocabulary * min(_HEAD_CHUNK_TOKENS, micro_batch * length)
    activations = micro_batch * length * per_token * compute_bytes + head

    logits = 3 * _FP32 * size.vocabulary * sequences
    engine_activations = _ENGINE_BATCH_TOKENS * 4 * (size.hidden + size.intermediate) * compute_bytes
    engine = size.parameters * compute_bytes + _ENGINE_WORKSPACE + logits + engine_activations
    kv_token = 2 * size.layers * size.kv_width * compute_bytes
    wanted = sequences * _blocks(length) * kv_token
    needed = _blocks(longest) * kv_token

    trainer = weights + optimizer + (0 if sleeps else activations)
    left = int(free * _SAFE) - trainer - engine
    wanted = max(wanted, needed)
    cache = min(wanted, left) + min(_ENGINE_SPARE, max(0, left - wanted) // 2)
    made = Plan(weights, optimizer, activations, engine, max(cache, needed), total, roomy=cache >= wanted)
    if left < needed:
        short = (needed - left) / GIB
        raise UserError(
            f"trainer and vLLM do not fit on this GPU: {made} are needed, {free / GIB:.1f} of {total / GIB:.1f} GiB "
            f"are free, {short:.1f} GiB too little. Cures: a smaller --per_device_train_batch_size, "
            "--gradient_checkpointing true, --dtype bfloat16, --vllm_max_model_length, --vllm_enable_sleep_mode true, "
            "or --vllm_mode server."
        )
    return made


def _blocks(tokens: int) -> int:
    """Tokens rounded up to whole blocks of the cache."""
    return -(-tokens // _KV_BLOCK) * _KV_BLOCK
