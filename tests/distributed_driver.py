"""GRPO runs in one of several processes, on completions that do not depend on how many there are.

`accelerate launch … tests/distributed_driver.py FOLDER JOB…` does the jobs one after another in `FOLDER/JOB`;
`jobs(FOLDER, JOB…)` does them in this process.
"""

import os
import signal
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import save_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import TrainerCallback
from trl.generation.vllm_generation import DistributedBackend

from mua_rl.exits import run_command
from mua_rl.grpo import run as grpo
from mua_rl.grpo import trainer as trainers
from mua_rl.grpo.arguments import parse
from mua_rl.grpo.trainer import GRPOTrainer
from mua_rl.lm import models
from mua_rl.rollouts.fsdp2 import reshard
from mua_rl.rollouts.sync import FullRollouts
from mua_rl.run import processes
from mua_rl.run.folder import RunFolder

STEPS, SAVED, DEATH = 5, 2, 4  # steps of a run; of its first checkpoint; the one in which a process of "killed" dies
FLAGS = ["--completions_per_step", "16", "--num_generations", "2", "--max_steps", str(STEPS), "--report_to", "none"]
FLAGS += ["--held_out_steps", "3", "--held_out_problems", "33", "--save_steps", str(SAVED), "--seed", "3"]
RANKS = {"lora": "8", "fft": "full", "passes-lora": "8", "passes-fft": "full", "killed": "8", "diverged": "8"}
# Three steps of eight passes in all.
PASSES = ["--per_device_train_batch_size", "2", "--max_steps", "3", "--held_out_steps", "0", "--save_strategy", "no"]


def score(prompts, completions, **kwargs):
    """A reward by which the completions of a group differ."""
    return [zlib.crc32(f"{p}{c}".encode()) % 7 / 7 for p, c in zip(prompts, completions, strict=True)]


def fixed(prompts, trainer):
    """The k-th completion of a prompt is always the same; a group is in one process."""
    tokenizer = trainer.processing_class
    ids, completions, seen = tokenizer(list(prompts))["input_ids"], [], {}
    for prompt in prompts:
        k = seen[prompt] = seen.get(prompt, -1) + 1
        digits = str(zlib.crc32(f"{prompt}{k}".encode()) % 1000)
        completions.append([*tokenizer(digits, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
    assert set(seen.values()) == {1}
    return {"prompt_ids": ids, "completion_ids": completions, "logprobs": None}


def jobs(folder, *names):
    """Do the jobs."""
    prepare, make_trainer, held_out = grpo.prepare_grpo, grpo.make_trainer, trainers.held_out

    def prepared(*args):
        setup = prepare(*args)
        return replace(setup, task=replace(setup.task, rewards=(score,)))

    def made(setup, arguments, run):
        trainer, measure = make_trainer(setup, arguments, run)
        trainer.rollout_func = fixed

        def measured():
            result = measure()
            if setup.adapter.rank is None:
                push(trainer, run.path / "pushed.safetensors")
            return result

        return trainer, measured

    def uneven(model, tokenizer, task, rows, length, **options):
        return held_out(model, tokenizer, task, rows, 2 + 2 * processes.rank(), **options)

    grpo.prepare_grpo, grpo.make_trainer = prepared, made
    step = GRPOTrainer.training_step
    try:
        for name in names:
            GRPOTrainer.training_step = disturbed(step, name)
            # Processes end their answers at other times.
            trainers.held_out = uneven if name == "killed" else held_out
            if name.startswith("resume:"):
                flags = ["--resume", str(Path(folder) / name.removeprefix("resume:"))]
            else:
                flags = [*FLAGS, "--rank", RANKS[name], "--lr", "0.001", "--output_dir", str(Path(folder) / name)]
            if name.startswith("passes"):
                train_unmeasured([*flags, *PASSES, "--model", str(untied(Path(folder) / "untied"))])
            else:
                grpo.train(*parse(flags))
    finally:
        grpo.prepare_grpo, grpo.make_trainer, trainers.held_out = prepare, make_trainer, held_out
        GRPOTrainer.training_step = step


def untied(folder):
    """The embedded model with an output layer of its own, written to a folder."""

    def make(empty):
        model = models.load_model(models.EMBEDDED)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(1.1 * model.lm_head.weight.detach())
        model.save_pretrained(empty)
        models.load_tokenizer(models.EMBEDDED).save_pretrained(empty)

    return models.made_once(folder, make)


def train_unmeasured(flags):
    """Train as a resumed run does: none of the trainer's own generation, which calls every layer, comes before.

    What a GPU's bf16 and an engine bring is there without their rounding: gradients are reduced in fp32, and the
    engine's check looks at log-probs before the first step.
    """
    arguments, adapter_arguments, _ = parse(flags)
    setup = grpo.prepare_grpo(arguments, adapter_arguments)
    run = RunFolder(arguments.requested_output_dir)
    trainer, _ = grpo.make_trainer(setup, arguments, run)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)

    class Check(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            with torch.no_grad():
                trainer.log_probs([[1, 5, 6]], [[7, 8]])
            if setup.adapter.rank is None:
                push(trainer, run.path / "pushed.safetensors")
            reshard(trainer.model)  # as the next sync does

    trainer.add_callback(Check())
    trainer.train()
    trainer.save_model(str(run.path / setup.adapter.saved_as))


def push(trainer, path):
    """Bring all weights to an engine that writes down what it is given."""
    pushed = {}
    runner = SimpleNamespace(model=SimpleNamespace(load_weights=pushed.update))
    engine = SimpleNamespace(model_executor=SimpleNamespace(driver_worker=SimpleNamespace(model_runner=runner)))
    rollouts = object.__new__(FullRollouts)
    rollouts.model, rollouts.accelerator, rollouts.mode = trainer.model_wrapped, trainer.accelerator, "colocate"
    rollouts.llm = SimpleNamespace(llm_engine=engine, reset_prefix_cache=lambda: None)
    rollouts.enable_sleep_mode, rollouts._dist = False, DistributedBackend(trainer.accelerator)
    rollouts.sync_weights()
    if processes.is_main():
        named = {name.removeprefix("module."): weight.detach().clone() for name, weight in pushed.items()}
        save_file(named, path)


def disturbed(step, name):
    """The training step, in which the last process dies, or has a gradient that is not a number."""

    def disturb(self, model, *args):
        last = processes.count() > 1 and processes.rank() == processes.count() - 1
        if name == "killed" and last and self.state.global_step == DEATH - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        weight = next(p for p in model.parameters() if p.requires_grad)
        if name == "diverged" and last and processes.sharding() == "zero3":  # which steps before it comes back
            weight.register_hook(lambda gradient: gradient * float("nan"))
        loss = step(self, model, *args)
        if name == "diverged" and last and weight.grad is not None:
            weight.grad.fill_(float("nan"))
        return loss

    return disturb


def allow_fsdp_on_the_cpu():
    """accelerate takes FSDP for GPUs alone, by the name of how processes talk; PyTorch's works here too."""
    inner = PartialState.__init__

    def init(self, *args, **kwargs):
        inner(self, *args, **kwargs)
        if self._shared_state.get("distributed_type") is DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = init


if __name__ == "__main__":
    torch.set_num_threads(1)
    if processes.sharding() == "fsdp2":
        allow_fsdp_on_the_cpu()
    run_command(lambda: jobs(*sys.argv[1:]))
