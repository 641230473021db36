"""The arguments of `python -m mua_rl.grpo`: TRL's, with the paper's defaults, and ours."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from trl import GRPOConfig

from mua_rl.envs.tasks import with_whole_path
from mua_rl.errors import UserError
from mua_rl.lm import models
from mua_rl.run import processes
from mua_rl.run.arguments import AdapterArguments, parse_run
from mua_rl.run.folder import ADAPTER_CONFIG, RunFolder, is_adapter
from mua_rl.run.judge import PATIENCE

_LEAST = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "completions_per_step": 1,
    "steps_per_generation": 1, "num_iterations": 1, "num_generations": 2, "max_completion_length": 1,
    "max_prompt_length": 1, "held_out_problems": 1, "held_out_steps": 0, "patience": 0, "beta": 0, "epsilon": 0,
    "weight_decay": 0, "max_grad_norm": 0, "top_k": 0, "neftune_noise_alpha": 0,
}  # fmt: skip
_SHARES = ("top_p", "min_p", "top_entropy_quantile")
_CHOICES = {
    "loss_type": ("dapo", "grpo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    "importance_sampling_level": ("token", "sequence"),
    "scale_rewards": ("group", "batch", "none", True, False),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
    "vllm_importance_sampling_mode": ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
}
"""Words that TRL's trainer compares in the midst of a step."""
_NOT_TAKEN = {
    "hub_token": "would be in the run folder, which --push_to_hub makes public: set HF_TOKEN, or hf auth login",
    "resume_from_checkpoint": "is not how a run goes on: --resume RUN takes its newest checkpoint",
    "eval_on_start": "is not needed: held-out accuracy is measured before the first step",
}
"""Options of TRL and transformers that would do harm, or nothing, and why."""
_DEFAULTS = {"model": models.EMBEDDED, "task": "arithmetic"}
"""Taken in `__post_init__`: a field's default that is given by name is more than a default to --start_from."""
_SEEDS = 2**32  # NumPy takes no larger ones


LIKES = {
    "model_name_or_path": "--model",
    "model_revision": "--model_init_kwargs '{\"revision\": …}'",
    "attn_implementation": "--model_init_kwargs '{\"attn_implementation\": …}'",
    "torch_dtype": "--dtype",
    "dataset_name": "--task, which brings its rewards, as in --task gsm8k or --task jsonl:FILE",
    "dataset_config": "--task",
    "dataset_prompt_column": "--task jsonl:FILE, whose column is prompt",
    "dataset_train_split": "--task",
    "dataset_test_split": "--task",
    "reward_funcs": "--task, which brings its rewards",
    "system_prompt": "a task of your own, whose prompts begin with it",
    "chat_template": "--tokenizer_name, a tokenizer that has it",
    "use_peft": "--rank 32 for a LoRA, which is the default, --rank full for all weights",
    "lora_r": "--rank",
    "lora_target_modules": "--target_modules",
    "lora_dropout": "none: a LoRA has no dropout here",
    "lora_task_type": "none: it is CAUSAL_LM",
    "lora_modules_to_save": "none: a LoRA is trained alone, --rank full trains every weight",
    "use_rslora": "--alpha 'c/sqrt(r)'",
    "use_dora": "none: DoRA has no rule for its learning rate",
    "load_in_8bit": "--load_in_4bit true",
    "bnb_4bit_quant_type": "--load_in_4bit true, which is NF4",
    "use_bnb_nested_quant": "none: with --load_in_4bit true it is off",
    "wandb_project": "the environment variable WANDB_PROJECT",
    "wandb_entity": "the environment variable WANDB_ENTITY",
    "vllm_device": "--vllm_mode",
    "resume_from_checkpoint": "--resume RUN",
}
"""Settings of TRL's and open-r1's scripts, and what takes their place here."""


@dataclass
class GRPOArguments(GRPOConfig):
    """TRL's `GRPOConfig` with the defaults of the paper's RLVR recipe; every field is a flag and a YAML key.

    These defaults differ from TRL's: AdamW without weight decay, 5 % warm-up, cosine decay to a tenth of the peak,
    truncated completions masked, 32 prompts × 8 completions a step, no gradient checkpointing, and bf16 only where
    there is a GPU for it. DAPO loss, β = 0, clipping at 1 and temperature 1 are TRL's own.
    """

    model: str = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "embedded, smollm2, a model folder, or a hub id. Default: embedded, with --start_from that run's."
        },
    )
    task: str = field(
        default=None,  # type: ignore[assignment]
        metadata={
            "help": "A verifiable task; see mua_rl.envs.tasks. Default: arithmetic, with --start_from that run's own."
        },
    )
    tokenizer_name: str | None = field(
        default=None,
        metadata={"help": "Tokenizer. Default: the model's, with --start_from that run's own."},
    )
    bad_rows: str = field(
        default="skip",
        metadata={"help": "Rows that cannot be scored: skip and report, or refuse.", "choices": ["skip", "refuse"]},
    )
    isolation: str = field(
        default="strong",
        metadata={
            "help": "Sandbox of the code tasks: strong, or the weaker process.",
            "choices": ["strong", "process"],
        },
    )
    dtype: str = field(
        default="float32",
        metadata={"help": "Precision of the weights that LoRA leaves frozen.", "choices": ["float32", "bfloat16"]},
    )
    load_in_4bit: bool = field(
        default=False, metadata={"help": "QLoRA: the frozen base is quantised to 4 bits (NF4, by bitsandbytes)."}
    )
    held_out_problems: int | None = field(
        default=None, metadata={"help": "Held-out problems to measure with. Default: all that the task has."}
    )
    save_best: bool = field(
        default=False,
        metadata={"help": "Keep the policy that was best on the way (--held_out_steps) in best/, for --start_from."},
    )
    held_out_steps: int = field(
        default=25, metadata={"help": "Measure held-out accuracy every so many steps; 0: only before and after."}
    )
    patience: int = field(
        default=PATIENCE, metadata={"help": "Stop when so many steps in a row have taught nothing; 0: never."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "Run folder. Default: a new one under runs/."})
    learning_rate: float | None = field(default=None, metadata={"help": "The same as --lr."})  # type: ignore[assignment]
    max_steps: int = field(default=300, metadata={"help": "Optimizer steps; -1: as many as num_train_epochs makes."})
    per_device_train_batch_size: int | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Completions per forward pass. Default: 64, beside a vLLM engine as many as have room."},
    )
    gradient_accumulation_steps: int | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Forward passes per optimizer step. Default: 4, of all processes together."}
    )
    completions_per_step: int | None = field(
        default=None,
        metadata={
            "help": "Completions per optimizer step, of all processes together. Default: what the two flags above "
            "make, 256 without them."
        },
    )
    max_prompt_length: int | None = field(
        default=None,
        metadata={"help": "In tokens. Rows with longer prompts are left out. Default: all rows are taken."},
    )
    max_completion_length: int | None = field(default=None, metadata={"help": "In tokens. Default: the task's."})
    weight_decay: float = field(default=0.0, metadata={"help": "AdamW's weight decay."})
    warmup_steps: float = field(default=0.05, metadata={"help": "Steps, or below 1 the fraction of all steps."})
    lr_scheduler_type: str = field(default="cosine_with_min_lr", metadata={"help": "Name of the LR schedule."})
    lr_scheduler_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of the schedule. Default of the cosine: a minimum of a tenth."}
    )
    mask_truncated_completions: bool = field(
        default=True, metadata={"help": "Leave completions that hit the length limit out of the loss."}
    )
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade compute for memory."})
    logging_steps: float = field(default=1, metadata={"help": "Log every so many steps."})
    save_steps: float = field(default=50, metadata={"help": "Checkpoint every so many steps."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep."})
    vllm_sync: str = field(
        default="adapter",
        metadata={
            "help": "What a vLLM engine gets at each step: adapter (of a LoRA, A and B alone), or merged (TRL's way).",
            "choices": ["adapter", "merged"],
        },
    )
    vllm_gpu_memory_utilization: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Share of the GPU for a colocated engine. Default: planned from the sizes."}
    )
    report_to: list[str] | None | str = field(  # noqa: RUF036  # the order by which the parser takes several words
        default_factory=lambda: ["tensorboard"], metadata={"help": "tensorboard, wandb, trackio, none, or several."}
    )

    LIKES: ClassVar[dict[str, str]] = LIKES

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_words()
        self.model, self.task = self.model or _DEFAULTS["model"], self.task or _DEFAULTS["task"]
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        if self.bf16 is None:
            self.bf16 = not self.fp16 and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        self.passes_are_open = self.per_device_train_batch_size is None and self.gradient_accumulation_steps is None
        self.batch_is_given = not self.passes_are_open and self.completions_per_step is None
        self._set_batch(processes.launched())
        self.requested_output_dir = self.output_dir  # the next line fills in a default
        if not torch.cuda.is_available():
            self.dataloader_pin_memory = False
        if (processes.launched() > 1 or processes.sharded()) and not torch.accelerator.is_available():
            self.use_cpu = True  # accelerate takes several processes on the CPU for a mistake otherwise
        self.enable_jit_checkpoint = False  # every run saves at SIGTERM; transformers would end it as if it were done
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every trained weight is used; looking for others costs time
        super().__post_init__()
        if cast(Any, self.accelerator_config).dispatch_batches:
            raise UserError(
                "--accelerator_config takes no dispatch_batches: accelerate dispatches tensors, and GRPO's rows are "
                "text; each process reads its own without it."
            )
        if precision := {"dtype", "torch_dtype"} & self.load_options.keys():
            raise UserError(f"--model_init_kwargs takes no {precision.pop()}: give --dtype.")
        self._n_gpu = min(self.n_gpu, 1)  # a process is for one GPU: no torch.nn.DataParallel over all that it sees
        if self.save_steps >= 1:  # else `complete` knows of how many steps they are a share
            self.set_save_steps()

    def _check_numbers(self) -> None:
        """Refuse what TRL and transformers would take silently, or stumble over when the run has begun.

        Raises:
            UserError: A number is none of its kind.
        """
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"--{name} must be at least {least}, not {value}.")
        for name in _SHARES:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise UserError(f"--{name} must lie between 0 and 1, not at {value}.")
        if self.max_steps == 0 or self.max_steps < -1:
            raise UserError(f"--max_steps takes a positive number, or -1 for --num_train_epochs, not {self.max_steps}.")
        if not self.num_train_epochs > 0:
            raise UserError(f"--num_train_epochs takes a positive number, not {self.num_train_epochs:g}.")
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"--temperature takes a number above 0, not {self.temperature:g}: GRPO learns from samples that differ."
            )
        for name in ("seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < _SEEDS:
                raise UserError(f"--{name} must lie between 0 and {_SEEDS - 1}, not at {getattr(self, name)}.")

    def _check_words(self) -> None:
        """Refuse words that TRL would stumble over when the run has begun, and options that are none of ours.

        Raises:
            UserError: An option takes certain words, and this is none of them; or it is in `_NOT_TAKEN`.
        """
        for name, why in _NOT_TAKEN.items():
            if getattr(self, name):
                raise UserError(f"--{name} {why}.")
        for name, words in _CHOICES.items():
            if getattr(self, name) not in words:
                named = ", ".join(word for word in words if isinstance(word, str))
                raise UserError(f"--{name} takes one of {named}, not {getattr(self, name)!r}.")

    def _set_batch(self, number: int) -> None:
        """Share the completions of an optimizer step among a number of processes.

        Raises:
            UserError: They cannot be shared equally.
        """
        micro, passes = self.per_device_train_batch_size or 64, self.gradient_accumulation_steps
        if self.completions_per_step is None:
            self.completions_per_step = micro * (passes * number if passes else 4)
        each, rest = divmod(self.completions_per_step, number)
        if rest or each < 1:
            raise UserError(
                f"{self.completions_per_step} completions a step cannot be shared by {number} processes: choose "
                "another --completions_per_step."
            )
        if micro * (passes or 0) != each:
            micro = math.gcd(micro, each)
            if passes and self.steps_per_generation:
                self.steps_per_generation = max(1, self.steps_per_generation * (each // micro) // passes)
            passes = each // micro
        self.per_device_train_batch_size, self.gradient_accumulation_steps = micro, passes

    def set_save_steps(self) -> None:
        """A resumed run draws a batch of completions, so that a checkpoint belongs where one has been used up."""
        assert self.steps_per_generation and self.gradient_accumulation_steps
        passes = self.gradient_accumulation_steps
        each = math.lcm(self.steps_per_generation * self.num_iterations, passes) // passes
        steps = self.save_steps if self.save_steps >= 1 else self.save_steps * self.max_steps
        if steps > 0:  # else a share of a run whose steps are not known before it begins, or none at all
            self.save_steps = each * math.ceil(steps / each)

    @property
    def optimizer_steps_per_batch(self) -> int:
        """Optimizer steps that a batch of completions is used for; 1 also where a step takes several batches."""
        assert self.steps_per_generation and self.gradient_accumulation_steps
        return max(1, self.steps_per_generation * self.num_iterations // self.gradient_accumulation_steps)

    @property
    def load_options(self) -> dict[str, Any]:
        """Options with which the model and its tokenizer are loaded."""
        options = {"trust_remote_code": self.trust_remote_code, **cast(dict, self.model_init_kwargs or {})}
        if self.load_in_4bit:
            compute = "bfloat16" if self.bf16 else "float32"
            four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": compute}
            options["quantization_config"] = {"quant_method": "bitsandbytes", **four}
        return options

    @property
    def template(self) -> dict[str, Any]:
        """Options of the chat template."""
        return cast(dict, self.chat_template_kwargs or {})

    def wider_passes(self) -> list[tuple[int, int]]:
        """Forward passes that make the same optimizer step: (completions of one, how many), the widest first.

        Only the given one where the user has chosen, or where a step and a batch of completions are not the same.
        """
        assert self.per_device_train_batch_size and self.gradient_accumulation_steps
        micro, passes = self.per_device_train_batch_size, self.gradient_accumulation_steps
        if not self.passes_are_open or self.steps_per_generation != passes:
            return [(micro, passes)]
        return [(micro * k, passes // k) for k in range(passes, 0, -1) if passes % k == 0]

    def set_passes(self, completions: int, passes: int) -> None:
        """Take one of `wider_passes`."""
        if self.steps_per_generation == self.gradient_accumulation_steps:
            self.steps_per_generation = passes
        self.per_device_train_batch_size, self.gradient_accumulation_steps = completions, passes


def parse(argv: list[str] | None = None) -> tuple[GRPOArguments, AdapterArguments, dict]:
    """Command line to arguments.

    Raises:
        UserError: As `parse_run`; or `--start_from` contradicts `--model`.
    """
    adapter_arguments, arguments, given = parse_run(AdapterArguments, GRPOArguments, argv, length="max_steps")
    complete(arguments, adapter_arguments, given)
    return arguments, adapter_arguments, given


def complete(arguments: GRPOArguments, adapter_arguments: AdapterArguments, given: dict) -> None:
    """Fill in, and note among what was given, what `--start_from` and `--num_train_epochs` imply.

    A task that was given by a relative path is noted by its whole one, so that the settings mean the same anywhere.

    Raises:
        UserError: `--start_from` names no run, or contradicts `--model`.
    """
    if adapter_arguments.start_from:
        if is_adapter(adapter_arguments.start_from):
            given["model"] = arguments.model = given.get("model") or _base_of_adapter(adapter_arguments.start_from)
        else:
            _inherit(arguments, RunFolder.around(adapter_arguments.start_from), given)
    else:
        for name in [name for name, default in _DEFAULTS.items() if given.get(name) == default]:
            del given[name]  # the settings are those of a run that leaves it out
    if "task" in given:
        given["task"] = with_whole_path(given["task"])
    if "num_train_epochs" in given and "max_steps" not in given:
        arguments.max_steps = -1
    arguments.set_save_steps()


def _base_of_adapter(folder: str) -> str:
    """The base model that somebody's adapter names.

    Raises:
        UserError: It names none.
    """
    base = json.loads((Path(folder) / ADAPTER_CONFIG).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(f"the adapter {folder} does not say what its base is: give --model.")
    return base


def _inherit(arguments: GRPOArguments, earlier: RunFolder, given: dict) -> None:
    """A run that starts from another has its model, and its tokenizer and task unless others are given.

    Raises:
        UserError: Another model, or another way to load it, is given; or no task is, and the earlier run had a data set
            instead of one.
    """
    settings = earlier.settings()
    model = settings.get("model", models.EMBEDDED)
    if given.get("model", model) != model:
        raise UserError(f"--start_from {earlier.path} brings its own model, {model}: drop --model.")
    options = model_init_kwargs(settings)
    if "model_init_kwargs" in given and arguments.model_init_kwargs != options:
        raise UserError(f"--start_from {earlier.path} brings its own --model_init_kwargs, {options}: drop the flag.")
    if "task" not in given and "dataset_name" in settings:
        raise UserError(f"{earlier.path} learnt from {settings['dataset_name']}, which has no reward: give a --task.")
    arguments.model = model
    arguments.task = given.get("task", settings.get("task", arguments.task))
    arguments.tokenizer_name = given.get("tokenizer_name", settings.get("tokenizer_name"))
    arguments.model_init_kwargs = options
    arguments.load_in_4bit = given.get("load_in_4bit", settings.get("load_in_4bit", False))
    inherited = {"tokenizer_name": arguments.tokenizer_name, "model_init_kwargs": options}
    given |= {"model": model, "task": arguments.task, **{k: v for k, v in inherited.items() if v is not None}}


def model_init_kwargs(settings: dict) -> dict | None:
    """`--model_init_kwargs` among a run's settings, which have it as it was given."""
    given = settings.get("model_init_kwargs")
    return json.loads(given) if isinstance(given, str) else given
