"""`python -m mua_rl.plan MODEL --rank 32 --gpus 8`: memory by part, expected speed and what to type, for each layout.

Everything comes from the model's configuration: the sizes are those of the model on the meta device with the adapter
attached, the memory is the arithmetic of `mua_rl.rollouts.memory` that runs themselves plan with, and the speed a
roofline (`Estimate`), which is an estimate and says so.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from mua_rl.adapter.adapters import adapter_for
from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.flags import FlagParser
from mua_rl.lm import models
from mua_rl.lr.rank import parse_rank
from mua_rl.lr.spec import AdapterSpec
from mua_rl.rollouts.memory import GIB, EngineMemory, PolicySize, TrainerMemory, engine_memory, trainer_memory

SHAPES = {
    # hidden, intermediate, layers, heads, key heads, vocabulary, tied: SmolLM2, Qwen2.5, Llama 3.1
    "135m": (576, 1536, 30, 9, 3, 49152, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
    "70b": (8192, 28672, 80, 64, 8, 128256, False),
}

_SAFE = 0.95  # of the memory: the rest is the CUDA context and fragments
_NODE = 8  # GPUs that NVLink joins
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
        engines: vLLM engines.
        tensor_parallel: GPUs of one engine.
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
class Outcome:
    """What a layout comes to.

    Attributes:
        trainer, engine: Bytes on a GPU of either kind; of the narrowest pass where nothing fits.
        cache: Bytes of KV cache that fit beside them, at most what all of an engine's sequences want.
        passes: `None`: nothing fits.
        estimate: Seconds; `None`: nothing fits.
    """

    layout: Layout
    trainer: TrainerMemory
    engine: EngineMemory
    cache: int
    passes: Passes | None
    estimate: "Estimate | None"

    @property
    def needed(self) -> int:
        """Bytes of the fullest GPU."""
        engine = self.engine.weights + self.engine.workspace + self.cache
        return self.trainer.total + engine if self.layout.colocated else max(self.trainer.total, engine)


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
        """Of a step: gradients and the next layer's weights travel while the GPU computes."""
        return self.generation + max(self.training, self.communication) + self.sync


def estimate(size: PolicySize, layout: Layout, passes: Passes, work: Work, gpu: Gpu, concurrent: int) -> Estimate:
    """The roofline of a layout.

    Args:
        size, layout, passes, work, gpu: What runs where.
        concurrent: Sequences that an engine's cache has room for at once.
    """
    sequences = -(-work.completions // layout.engines)
    batch = min(sequences, concurrent, _ENGINE_SEQUENCES)
    kv_token = engine_memory(size, sequences=batch).kv_token
    gpus = layout.tensor_parallel
    reads = 2 * size.parameters + batch * (work.prompt + work.completion / 2) * kv_token
    step = max(
        reads / (gpu.bandwidth * Estimate.MEMORY_PEAK),
        2 * size.parameters * batch / (gpu.flops * Estimate.PREFILL_PEAK),
    )
    decode = (step / gpus + Estimate.DECODE_STEP_S) * work.completion * math.ceil(sequences / batch)
    prefill = 2 * size.parameters * sequences * work.prompt / (gpu.flops * Estimate.PREFILL_PEAK * gpus)

    operations = (6 if size.full else 4) + (2 if passes.checkpointing else 0)
    tokens = work.completions * work.length / layout.trainers
    training = operations * size.parameters * tokens / (gpu.flops * Estimate.TRAINING_PEAK)

    link = (gpu.nvlink if layout.trainers <= _NODE else gpu.network) * Estimate.LINK_PEAK
    others = (layout.trainers - 1) / layout.trainers
    moved = 2 * 4 * size.trained * others  # all-reduce, fp32
    if layout.sharded:
        gathers = 3 if passes.checkpointing else 2
        moved = (gathers * 2 * size.parameters + 4 * size.trained) * others * passes.number
    sync = 2 * (size.parameters if size.full else size.trained) / link
    return Estimate(decode + prefill, training, moved / link, sync)


def policy_size(config: object, rank: str) -> PolicySize:
    """The sizes of a model with its adapter, made on the meta device: nothing is loaded.

    Raises:
        UserError: The rank or the model cannot be used.
    """
    parsed = parse_rank(rank)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return PolicySize.of(adapter_for(AdapterSpec.parse(parsed), "mlp").attach(model))


def load_config(model: str | None, params: str | None) -> object:
    """The configuration of `MODEL`, or the shape of `--params`.

    Raises:
        UserError: Neither is given, or there is none.
    """
    if (model is None) == (params is None):
        raise UserError("give a model (embedded, smollm2, a folder with a config.json, a hub id), or --params.")
    if params is not None:
        if params.lower() not in SHAPES:
            raise UserError(f"--params takes {', '.join(SHAPES)}, not {params!r}; for others give a model folder.")
        hidden, intermediate, layers, heads, key_heads, vocabulary, tied = SHAPES[params.lower()]
        return LlamaConfig(
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            vocab_size=vocabulary,
            tie_word_embeddings=tied,
        )
    assert model is not None
    if model.lower() in SHAPES:
        raise UserError(f"{model} is a shape and no model: --params {model}.")
    with models.loading(f"the configuration of {model}"):
        return AutoConfig.from_pretrained(models.model_path(model))


def layouts(gpus: int, completions: int, size: PolicySize, gpu: Gpu) -> Iterator[Layout]:
    """The layouts to compare on so many GPUs; trainers share a step's completions equally."""
    beside, alone = (_tensor_parallel(size, int(gpu.memory * share), gpus) for share in (0.45, 0.9))
    if gpus == 1:
        yield Layout("colocated", 1, 1, 1, False)
        return
    yield Layout("ddp", gpus, gpus // beside, beside, False)
    yield Layout("fsdp2", gpus, gpus // beside, beside, True)
    for trainers in sorted({gpus // 4, gpus // 2, 3 * gpus // 4} - {0}):
        if completions % trainers:
            continue
        rest = gpus - trainers
        if rest >= alone:
            yield Layout("server", trainers, rest // alone, alone, trainers > 1)


def _tensor_parallel(size: PolicySize, room: int, gpus: int) -> int:
    """The fewest GPUs, a power of two and no more than a node, over which an engine's weights leave room."""
    number = 1
    while 2 * size.parameters / number > room and 2 * number <= min(gpus, _NODE):
        number *= 2
    return number


def outcome(size: PolicySize, layout: Layout, work: Work, gpu: Gpu) -> Outcome:
    """The passes of a layout that fit and take the least time."""
    each = work.completions // layout.trainers
    sequences = -(-work.completions // layout.engines)
    engine = engine_memory(size, sequences=min(sequences, _ENGINE_SEQUENCES), tensor_parallel=layout.tensor_parallel)
    room = int(gpu.memory * _SAFE)
    one, wanted = engine.cache(1, work.length), engine.cache(sequences, work.length)
    fitting, least = [], None
    for checkpointing in (False, True):
        for micro_batch in [each // number for number in range(1, each + 1) if each % number == 0]:
            trainer = trainer_memory(
                size,
                micro_batch=micro_batch,
                length=work.length,
                checkpointing=checkpointing,
                processes=layout.trainers,
                sharded=layout.sharded,
            )
            left = room - engine.weights - engine.workspace - (trainer.total if layout.colocated else 0)
            if left >= one and trainer.total <= room:
                passes, cache = Passes(micro_batch, each // micro_batch, checkpointing), min(wanted, left)
                made = estimate(size, layout, passes, work, gpu, cache // one)
                fitting.append(Outcome(layout, trainer, engine, cache, passes, made))
            least = Outcome(layout, trainer, engine, one, None, None)
    assert least is not None
    return min(fitting, key=lambda o: o.estimate.seconds if o.estimate else math.inf, default=least)


def command(outcome: Outcome, model: str, rank: str, work: Work) -> list[str]:
    """What to type for a layout."""
    layout, passes = outcome.layout, outcome.passes
    assert passes is not None
    flags = f"--model {model} --rank {rank} --use_vllm --max_completion_length {work.completion}"
    flags += f" --completions_per_step {work.completions} --per_device_train_batch_size {passes.micro_batch}"
    flags += "" if rank in ("0", "full", "fft") else " --dtype bfloat16"
    flags += " --gradient_checkpointing true" if passes.checkpointing else ""
    if layout.colocated and layout.tensor_parallel > 1:
        flags += f" --vllm_tensor_parallel_size {layout.tensor_parallel}"
    lines = []
    if layout.name == "server":
        flags += " --vllm_mode server --vllm_server_base_url http://HOST:8000"
        serve = f"vllm serve {model} --logprobs-mode processed_logprobs --max-logprobs -1"
        serve += f" --tensor-parallel-size {layout.tensor_parallel} --data-parallel-size {layout.engines}"
        if rank in ("0", "full", "fft"):
            serve += ' --weight-transfer-config \'{"backend": "nccl"}\''
        else:
            serve += f" --enable-lora --max-lora-rank {rank}"
        lines.append(f"VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 {serve}")
    if layout.trainers == 1:
        return [*lines, f"python -m mua_rl.grpo {flags}"]
    name = "fsdp2" if layout.sharded else "ddp"
    machines = f" --num_machines {layout.trainers // _NODE} --machine_rank RANK --main_process_ip HOST0"
    launch = f"accelerate launch --config_file $(python -m mua_rl.accelerate_configs {name}) "
    launch += f"--num_processes {layout.trainers}" + machines * (layout.trainers > _NODE)
    return [*lines, f"{launch} -m mua_rl.grpo {flags}"]


def best(outcomes: list[Outcome]) -> Outcome | None:
    """The fastest that fits; of those within a twentieth of it the first, which is the simplest."""
    fitting = [(o, o.estimate.seconds) for o in outcomes if o.estimate is not None]
    if not fitting:
        return None
    fastest = min(seconds for _, seconds in fitting)
    return next(o for o, seconds in fitting if seconds <= 1.05 * fastest)


def table(outcomes: list[Outcome], size: PolicySize, work: Work, steps: int) -> Table:
    """Memory by part on a GPU, and the estimate, one column a layout."""
    shown = Table("", *(_title(o.layout) for o in outcomes), title_justify="left")

    def row(name: str, values: list[str], **options: object) -> None:
        shown.add_row(name, *values, **options)  # type: ignore[arg-type]

    def gib(name: str, values: list[float], **options: object) -> None:
        row(name, [f"{value / GIB:.1f}" for value in values], **options)

    shares = [o.layout.trainers if o.layout.sharded else 1 for o in outcomes]
    base = [size.frozen_bytes / share for share in shares]
    trained = "trained weights" if size.full else "adapter"
    row("GPUs: trainers, engines × tensor parallel", [_gpus(o.layout) for o in outcomes])
    gib("trainer: base weights, GiB", base)
    gib(f"trainer: {trained}", [o.trainer.weights - b for o, b in zip(outcomes, base, strict=True)])
    gib("trainer: gradients", [o.trainer.gradients for o in outcomes])
    gib("trainer: optimizer", [o.trainer.moments for o in outcomes])
    gib("trainer: casts and gathered layers", [o.trainer.casts for o in outcomes])
    gib("trainer: activations", [o.trainer.activations for o in outcomes])
    gib("trainer: logits and loss", [o.trainer.head for o in outcomes])
    gib("engine: weights", [o.engine.weights for o in outcomes])
    gib("engine: workspace", [o.engine.workspace for o in outcomes])
    gib("engine: KV cache", [o.cache for o in outcomes])
    gib("fullest GPU", [o.needed for o in outcomes], style="bold", end_section=True)
    fits = [_passes(o.passes) for o in outcomes]
    row("passes of a process", fits)
    estimates = [o.estimate for o in outcomes]
    for phase in ("generation", "training", "communication", "sync"):
        row(f"{phase}, s (estimate)", [f"{getattr(e, phase):.2f}" if e else "–" for e in estimates])
    row("step, s (estimate)", [f"{e.seconds:.1f}" if e else "–" for e in estimates])
    tokens = work.completions * work.completion
    row("tokens/s (estimate)", [f"{tokens / e.seconds:,.0f}" if e else "–" for e in estimates], style="bold")
    row(f"hours of {steps} steps (estimate)", [f"{steps * e.seconds / 3600:.1f}" if e else "–" for e in estimates])
    return shown


def _title(layout: Layout) -> str:
    return layout.name if layout.colocated else f"server, {layout.trainers} train"


def _gpus(layout: Layout) -> str:
    return f"{layout.trainers}, {layout.engines} × {layout.tensor_parallel}"


def _passes(passes: Passes | None) -> str:
    if passes is None:
        return "does not fit"
    return f"{passes.number} of {passes.micro_batch}" + ", recomputed" * passes.checkpointing


def main() -> None:
    """The command line."""
    parser = FlagParser(description="Memory by part, expected speed and what to type, for each layout.")
    parser.add_argument("model", nargs="?", help="embedded, smollm2, a folder with a config.json, or a hub id")
    parser.add_argument("--params", help=f"instead of a model, a shape: {', '.join(SHAPES)}")
    parser.add_argument("--rank", default="32", help="LoRA rank; 0 or full: full finetuning")
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--gpu", choices=list(GPUS), default="h100")
    parser.add_argument("--gpu_memory", type=float, help="GiB, where the GPU has other than is usual")
    parser.add_argument("--completions", type=int, default=256, help="completions per optimizer step")
    parser.add_argument("--prompt_length", type=int, default=128, help="tokens")
    parser.add_argument("--completion_length", type=int, default=512, help="tokens")
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps of a run")
    args = parser.parse_args()
    for name in ("gpus", "gpu_memory", "completions", "prompt_length", "completion_length", "steps"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name} takes a positive number, not {value}.")
    kind = GPUS[args.gpu]
    gpu = kind if args.gpu_memory is None else replace(kind, memory=int(args.gpu_memory * GIB))
    work = Work(args.completions, args.prompt_length, args.completion_length)
    size = policy_size(load_config(args.model, args.params), args.rank)
    if args.completions % args.gpus:
        raise UserError(f"{args.completions} completions cannot be shared by {args.gpus} GPUs: choose --completions.")
    outcomes = [outcome(size, layout, work, gpu) for layout in layouts(args.gpus, work.completions, size, gpu)]
    console = Console()
    name = args.model or args.params
    trained = "all trained" if size.full else f"{size.trained / 1e6:.1f} M trained"
    lengths = f"{work.prompt} + {work.completion} tokens"
    console.print(
        f"{name}: {size.parameters / 1e9:.2f} B weights, {trained}; {args.gpus} × {args.gpu}, "
        f"{gpu.memory / GIB:.0f} GiB; a step of {work.completions} completions, {lengths}",
        highlight=False,
    )
    console.print(table(outcomes, size, work, args.steps))
    chosen = best(outcomes)
    if chosen is None:
        raise UserError("no layout fits: more GPUs, more memory, shorter completions, or LoRA instead of all weights.")
    console.print(f"[bold]{_title(chosen.layout)}[/]:", highlight=False)
    for line in command(chosen, args.model or "MODEL", args.rank, work):
        print(line)


if __name__ == "__main__":
    run_command(main)
