"""`python -m mua_rl.plan MODEL --rank 32 --gpus 8`: memory by part, expected speed and what to type, for each layout.

Everything comes from the model's configuration: the sizes are those of the model on the meta device with the adapter
attached, the memory is the arithmetic of `mua_rl.rollouts.memory` that runs themselves plan with, and the speed is a
roofline (`mua_rl.rollouts.layouts.Estimate`), which is an estimate and says so.
"""

import math
from dataclasses import replace

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
from mua_rl.rollouts.layouts import GPUS, NODE, Layout, Outcome, Passes, Work, best, layouts, outcome
from mua_rl.rollouts.memory import GIB, PolicySize

SHAPES = {
    # hidden, intermediate, layers, heads, key heads, vocabulary, tied: SmolLM2, Qwen2.5, Llama 3.1
    "135m": (576, 1536, 30, 9, 3, 49152, True),
    "1.5b": (1536, 8960, 28, 12, 2, 151936, True),
    "8b": (4096, 14336, 32, 32, 8, 128256, False),
    "70b": (8192, 28672, 80, 64, 8, 128256, False),
}


def load_config(model: str | None, params: str | None) -> object:
    """The configuration of `MODEL`, or the shape of `--params`.

    Raises:
        UserError: Neither is given or both are, or there is no such model or shape.
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


def policy_size(config: object, rank: str) -> PolicySize:
    """The sizes of a model with its adapter, made on the meta device: nothing is loaded.

    Raises:
        UserError: The rank or the model cannot be used.
    """
    parsed = parse_rank(rank)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return PolicySize.of(adapter_for(AdapterSpec.parse(parsed), "mlp").attach(model))


def command(outcome: Outcome, model: str, rank: str, work: Work) -> list[str]:
    """What to type for a layout."""
    layout, passes = outcome.layout, outcome.passes
    assert passes is not None
    is_full = parse_rank(rank) is None
    flags = f"--model {model} --rank {rank} --use_vllm --max_completion_length {work.completion}"
    flags += f" --completions_per_step {work.completions} --per_device_train_batch_size {passes.micro_batch}"
    flags += " --dtype bfloat16" * (not is_full) + " --gradient_checkpointing true" * passes.checkpointing
    if layout.colocated and layout.tensor_parallel > 1:
        flags += f" --vllm_tensor_parallel_size {layout.tensor_parallel}"
    lines = []
    if layout.name == "server":
        flags += " --vllm_mode server --vllm_server_base_url http://HOST:8000"
        serve = f"vllm serve {model} --logprobs-mode processed_logprobs --max-logprobs -1"
        serve += f" --tensor-parallel-size {layout.tensor_parallel} --data-parallel-size {layout.engines}"
        lora = f" --enable-lora --max-lora-rank {rank}"
        serve += ' --weight-transfer-config \'{"backend": "nccl"}\'' if is_full else lora
        lines.append(f"VLLM_SERVER_DEV_MODE=1 VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 {serve}")
    if layout.trainers == 1:
        return [*lines, f"python -m mua_rl.grpo {flags}"]
    name = "fsdp2" if layout.sharded else "ddp"
    machines = f" --num_machines {layout.trainers // NODE} --machine_rank RANK --main_process_ip HOST0"
    launch = f"accelerate launch --config_file $(python -m mua_rl.accelerate_configs {name}) "
    launch += f"--num_processes {layout.trainers}" + machines * (layout.trainers > NODE)
    return [*lines, f"{launch} -m mua_rl.grpo {flags}"]


def table(outcomes: list[Outcome], size: PolicySize, work: Work, steps: int) -> Table:
    """Memory by part on a GPU, and the estimate, one column a layout."""
    shown = Table("", *(_title(o.layout) for o in outcomes), title_justify="left")

    def gib(name: str, values: list[float], **options: bool | str) -> None:
        shown.add_row(name, *[f"{value / GIB:.1f}" for value in values], **options)  # type: ignore[arg-type]

    base = [size.frozen_bytes / (o.layout.trainers if o.layout.sharded else 1) for o in outcomes]
    trained = "trained weights" if size.full else "adapter"
    gpus = [f"{o.layout.trainers}, {o.layout.engines} × {o.layout.tensor_parallel}" for o in outcomes]
    shown.add_row("GPUs: trainers, engines × tensor parallel", *gpus)
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
    shown.add_row("passes of a process", *[_passes(o.passes) for o in outcomes])
    estimates, tokens = [o.estimate for o in outcomes], work.completions * work.completion
    for phase in ("generation", "training", "communication", "sync"):
        shown.add_row(f"{phase}, s (estimate)", *[f"{getattr(e, phase):.2f}" if e else "–" for e in estimates])
    shown.add_row("step, s (estimate)", *[f"{e.seconds:.1f}" if e else "–" for e in estimates])
    speeds = [f"{tokens / e.seconds:,.0f}" if e else "–" for e in estimates]
    shown.add_row("tokens/s (estimate)", *speeds, style="bold")
    hours = [f"{steps * e.seconds / 3600:.1f}" if e else "–" for e in estimates]
    shown.add_row(f"hours of {steps} steps (estimate)", *hours)
    return shown


def _title(layout: Layout) -> str:
    return layout.name if layout.colocated else f"server, {layout.trainers} train"


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
    trained = "all trained" if size.full else f"{size.trained / 1e6:.1f} M trained"
    lengths = f"{work.prompt} + {work.completion} tokens"
    console.print(
        f"{args.model or args.params}: {size.parameters / 1e9:.2f} B weights, {trained}; {args.gpus} × {args.gpu}, "
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
