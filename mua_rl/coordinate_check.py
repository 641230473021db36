"""`python -m mua_rl.coordinate_check`: are feature updates flat in rank and width, as the learning-rate rules promise?

A few optimizer steps for each scheme at each rank (and, with --widths, at each width, on random weights), with the
learning rate scaled by the rules and, for contrast, with one fixed learning rate; then the size of each layer's feature
update (`mua_rl.probes.feature_updates`), its slope against rank or width, and a verdict. Exit code 1: a scheme that
should be flat is not.

The loss is that of a GRPO step: completions that the model itself samples for one prompt of the task, with advantages
of ±1 at random, the normalised rewards of a group of which half is right. Which completions are the good ones changes
where a step leads, not its size.
"""

import argparse
import copy
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from mua_rl.adapter.adapters import Adapter
from mua_rl.adapter.targets import fan_in
from mua_rl.envs.tasks import get_task, load_split
from mua_rl.errors import UserError
from mua_rl.exits import run_command
from mua_rl.flags import FlagParser
from mua_rl.lm import models
from mua_rl.lm.generation import complete
from mua_rl.lm.text import is_conversational, prompt_ids
from mua_rl.lr.record import check_learning_rate
from mua_rl.lr.rules import Configuration, best_lr_order, lr_ratio
from mua_rl.probes.coordinate_report import FIXED, TOLERANCE, TRANSFERRED, Row, figure, lines, table, write_csv
from mua_rl.probes.feature_updates import Loss, feature_updates
from mua_rl.run.arguments import AdapterArguments
from mua_rl.run.folder import RunFolder

EPILOG = """examples:
  python -m mua_rl.coordinate_check                                    the embedded model across ranks
  python -m mua_rl.coordinate_check --schemes B A A:1/r FFT --widths 64 128 256
  python -m mua_rl.coordinate_check --model smollm2 --ranks 8 32 128 --schemes B"""


@dataclass(frozen=True)
class Place:
    """One point of a check.

    Attributes:
        adapter: What is attached.
        make: Makes, from a seed, a model that may be trained and thrown away, and its batches.
    """

    adapter: Adapter
    make: Callable[[int], tuple[nn.Module, Sequence[Any]]]


def default_learning_rate(configuration: Configuration) -> float:
    """A quarter of the rule's order, 1/n or (α n r)^(-1/2): near the best LRs that were measured (docs/results)."""
    return best_lr_order(configuration) / 4


def check(
    axis: str,
    places: Sequence[Place],
    loss: Loss,
    learning_rate: float | None = None,
    steps: int = 6,
    seeds: Sequence[int] = range(3),
) -> list[Row]:
    """Measure the feature updates of one scheme along one axis, at the transferred LR and at a fixed one.

    Where the two are the same at every place, as with Init[B] and α = 1 across ranks, it is measured once.

    Args:
        axis: "rank" or "width": in what the places differ.
        places: The points, of one scheme; the learning rate of the others follows from the first one's.
        loss: `loss(model, batch)`.
        learning_rate: At the first place; `None`: `default_learning_rate`.
        steps: At least 2: only after the first step have both A and B moved.

    Raises:
        UserError: An adapter cannot be attached, or no loss depends on its layers.
        TransferError: The places are of schemes that share no learning rate.
    """
    configurations = [place.adapter.configuration(place.make(seeds[0])[0]) for place in places]
    first = configurations[0]
    base = learning_rate or default_learning_rate(first)
    rates = {TRANSFERRED: [base * lr_ratio(first, configuration) for configuration in configurations]}
    if not all(math.isclose(rate, base) for rate in rates[TRANSFERRED]):
        rates[FIXED] = [base] * len(places)
    rows = []
    for lr_rule in rates:
        for place, configuration, rate in zip(places, configurations, rates[lr_rule], strict=True):
            alpha = "" if configuration.rank is None else str(configuration.spec.alpha)
            point = (axis, configuration.scheme.value, alpha, configuration.rank, configuration.width, lr_rule, rate)
            for seed in seeds:
                model, batches = place.make(seed)
                updates = feature_updates(model, place.adapter, loss, batches, rate, steps, seed)
                rows += [Row(*point, seed, **asdict(update)) for update in updates]
    return rows


@dataclass(frozen=True)
class Group:
    """Completions to one prompt.

    Attributes:
        tokens: Prompt and completions, `(G, prompt_length + completion length)`, without padding.
        advantages: `(G,)`.
        prompt_length: Tokens of the prompt.
    """

    tokens: torch.Tensor
    advantages: torch.Tensor
    prompt_length: int


def policy_gradient_loss(model: nn.Module, group: Group) -> torch.Tensor:
    """`−mean(advantage · log p)` over the completions: GRPO's gradient while the policy is still the sampler."""
    logits = model(input_ids=group.tokens).logits[:, group.prompt_length - 1 : -1].float()
    completions = group.tokens[:, group.prompt_length :, None]
    log_p = logits.log_softmax(-1).gather(-1, completions)[..., 0]
    return -(group.advantages[:, None] * log_p).mean()


@torch.no_grad()
def sample_group(
    model: Any, tokenizer: Any, prompt: str | list[dict[str, str]], size: int, length: int, seed: int
) -> Group:
    """A `Group` of `size` completions of `length` tokens, sampled at temperature 1; half of its advantages are −1."""
    ids = prompt_ids(tokenizer, [prompt]) * size
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        written = complete(model, tokenizer, ids, length, temperature=1.0, min_new_tokens=length)
    tokens = torch.cat([torch.tensor(ids, device=written.device), written], 1)
    advantages = torch.ones(size, device=tokens.device)
    advantages[: size // 2] = -1.0
    return Group(tokens, advantages, len(ids[0]))


def at_width(config: PreTrainedConfig, width: int) -> PreTrainedConfig:
    """The configuration of a decoder with another hidden size; heads keep their size, so their number changes.

    Raises:
        UserError: The model's family has other sizes than Llama's, or its heads do not fit the width.
    """
    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    if missing := [name for name in names if not isinstance(getattr(config, name, None), int)]:
        raise UserError(
            f"--widths makes models with Llama's sizes, and a {config.model_type} has no {', '.join(missing)}: "
            "leave --widths out."
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    group = config.num_attention_heads // config.num_key_value_heads
    if width < 1 or width % (head * group):
        raise UserError(f"--widths takes multiples of {head * group} (whole heads) for this model, not {width}.")
    wider = copy.deepcopy(config)
    wider.hidden_size = width
    wider.intermediate_size = config.intermediate_size * width // config.hidden_size
    wider.num_attention_heads = width // head
    wider.num_key_value_heads = width // head // group
    return wider


def random_model(config: PreTrainedConfig, seed: int) -> PreTrainedModel:
    """A model whose weight matrices are drawn from N(0, 1/fan-in), so that features are Θ(1) at every width."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.dim() > 1:
                    weight.normal_(std=1 / math.sqrt(fan_in(weight)))
    return model


def parser() -> argparse.ArgumentParser:
    """The command line."""
    flags = FlagParser(
        prog="python -m mua_rl.coordinate_check",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    flags.add_argument("--model", default=models.EMBEDDED, help="embedded, smollm2, a folder or a hub id")
    flags.add_argument("--task", default="arithmetic", help="task whose prompts are taken")
    flags.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64], help="LoRA ranks (default: 4 16 64)")
    flags.add_argument("--widths", type=int, nargs="+", default=[], help="hidden sizes to check random weights at")
    flags.add_argument(
        "--schemes",
        nargs="+",
        default=["B", "A", "FFT"],
        help="B, A or FFT; the multiplier after a colon, as in A:1/r (default: B A FFT)",
    )
    flags.add_argument("--target_modules", nargs="+", default=["mlp"], help="mlp, all-linear, or names")
    flags.add_argument("--lr", type=float, help="LR at the smallest rank and width (default: a quarter of the rule's)")
    flags.add_argument("--steps", type=int, default=6, help="optimizer steps; the last one counts (default: 6)")
    flags.add_argument("--seeds", type=int, default=3, help="how many seeds to average over (default: 3)")
    flags.add_argument("--group", type=int, default=4, help="completions to the prompt (default: 4)")
    flags.add_argument("--length", type=int, default=8, help="tokens of a completion (default: 8)")
    flags.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    flags.add_argument("--tolerance", type=float, default=TOLERANCE, help="slope that is still flat (default: 0.25)")
    flags.add_argument("--output_dir", help="a new folder for the CSV and the figures (default: one under runs/)")
    return flags


def scheme_adapter(scheme: str, rank: int, target_modules: list[str]) -> Adapter:
    """The adapter of `B`, `A`, `A:1/r`, …, or `FFT` (which ignores the rank).

    Raises:
        UserError: The scheme is unknown.
    """
    if scheme.upper() == "FFT":
        return AdapterArguments(rank="full", target_modules=target_modules).adapter("mlp")
    init, _, alpha = scheme.partition(":")
    return AdapterArguments(
        rank=str(rank), init=init.upper(), alpha=alpha or "1", target_modules=target_modules
    ).adapter("mlp")


def measure(args: argparse.Namespace) -> list[Row]:
    """The checks that the command line asks for.

    Raises:
        UserError: Something that was given cannot be used.
    """
    ranks, widths, seeds = sorted(set(args.ranks)), sorted(set(args.widths)), range(args.seeds)
    adapters = [[scheme_adapter(s, rank, args.target_modules) for rank in ranks] for s in dict.fromkeys(args.schemes)]
    model, tokenizer = models.load_model(args.model).to(args.device), models.load_tokenizer(args.model)
    configs = [at_width(model.config, width) for width in widths]
    prompts = load_split(get_task(args.task), False, is_conversational(tokenizer))["prompt"]
    groups = [
        sample_group(model, tokenizer, prompts[seed % len(prompts)], args.group, args.length, seed) for seed in seeds
    ]

    def pretrained(seed: int) -> tuple[nn.Module, list]:
        return copy.deepcopy(model), [groups[seed]]

    def random_weights(config: PreTrainedConfig) -> Callable[[int], tuple[nn.Module, list]]:
        return lambda seed: (random_model(config, seed).to(args.device), [groups[seed]])

    rows = []
    for of_ranks in adapters:
        measured = of_ranks if of_ranks[0].rank else of_ranks[:1]  # FFT has no rank: one point to compare with
        checks = {"rank": [Place(adapter, pretrained) for adapter in measured]}
        if configs:
            checks["width"] = [Place(of_ranks[0], random_weights(config)) for config in configs]
        for axis, places in checks.items():
            rows += check(axis, places, policy_gradient_loss, args.lr, args.steps, seeds)
    return rows


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse numbers that nothing can be measured with.

    Raises:
        UserError: A number is out of its range.
    """
    if args.lr is not None:
        check_learning_rate(args.lr, "--lr")
    if (least_rank := min(args.ranks)) < 1:
        raise UserError(f"--ranks takes LoRA ranks of 1 or more, not {least_rank}; full finetuning is the scheme FFT.")
    for name, least in {"steps": 2, "seeds": 1, "group": 2, "length": 1, "tolerance": 0}.items():
        if not getattr(args, name) >= least:
            raise UserError(f"--{name} must be at least {least}, not {getattr(args, name)}.")


def main() -> None:
    """Run the command line."""
    args = parser().parse_args()
    check_arguments(args)
    transformers_logging.disable_progress_bar()
    run = RunFolder.create(args.output_dir, f"coordinate-check-{Path(args.model).name}")
    try:
        rows = measure(args)
        measured = lines(rows, args.tolerance)
        if not measured:
            raise UserError("only embeddings carry LoRA, and the rules do not speak of them: choose --target_modules.")
    except UserError:
        run.path.rmdir()  # nothing is in it
        raise
    run.start(vars(args))
    write_csv(rows, run.path / "coordinate_check.csv")
    console = Console()
    if not console.is_terminal:
        console.width = 120
    for axis in dict.fromkeys(line.axis for line in measured):
        figure(measured, axis).savefig(run.path / f"coordinate_check_{axis}.png", dpi=120)
        console.print(table(measured, axis))
    print(f"CSV and figures: {run.path}")
    failed = [line for line in measured if line.failed]
    for line in failed:
        what = f"slope {line.slope:+.2f}" if math.isfinite(line.slope) else line.verdict
        print(f"not flat: {line.quantity} of {line.title}, {what} across {line.axis}s")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    run_command(main)
