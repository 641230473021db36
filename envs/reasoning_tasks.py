"""`reasoning-gym:NAME`: problems of one of reasoning-gym's generators, scored by the generator's own scorer.

`reasoning-gym:chain_sum,max_terms=3,size=4096` sets the generator's options; `size` and `held_out_size` are the numbers
of training and held-out problems. `answer` says what of a reply counts: `answer=tags`, the default, what stands in the
`<answer>` tags that the prompt asks for; `answer=number` the last number, `answer=text` the whole reply, where the
prompt is the bare question: for small policies that know no tags, and answers without a chain of thought.
`--max_completion_length` bounds the reply.

Training problems are drawn with one seed and held-out ones with another; a training problem whose question is also held
out is left out.
"""

import ast
from typing import Any

from datasets import Dataset
from tqdm import tqdm

from mua_rl.envs.rows import Row, keep_good_rows
from mua_rl.envs.tasks import Task, register_task
from mua_rl.errors import UserError
from mua_rl.rewards import reasoning_worker
from mua_rl.rewards.format import THINK_ANSWER_INSTRUCTION, WatchedFormatReward
from mua_rl.rewards.reasoning import ANSWER_READERS, packed, reasoning_correct, reasoning_reward, reasoning_scores

TRAIN_PROBLEMS = 2048
HELD_OUT_PROBLEMS = 256
# The generators draw problem i from seed + i: neighbouring seeds would give the same problems.
_TRAIN_SEED, _HELD_OUT_SEED = 0, 10**9
FORMAT_WEIGHT = 0.1


@register_task("reasoning-gym")
def reasoning(argument: str | None = None, bad_rows: str = "skip") -> Task:
    """A generator of reasoning-gym."""
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError as error:
        raise UserError("reasoning-gym is not installed: pip install 'mua-rl[tasks]'") from error
    reasoning_worker.check_version()
    if argument is None:
        raise UserError(f"say which generator: reasoning-gym:NAME, one of {', '.join(sorted(DATASETS))}.")
    name, options = parse_options(argument)
    if name not in DATASETS:
        raise UserError(f"reasoning-gym has no generator {name!r}; it has {', '.join(sorted(DATASETS))}.")
    sizes = {"size": TRAIN_PROBLEMS, "held_out_size": HELD_OUT_PROBLEMS}
    sizes |= {key: options.pop(key) for key in sizes if key in options}
    for key, size in sizes.items():
        if type(size) is not int or size < 1:
            raise UserError(f"reasoning-gym:{argument}: {key} is {size!r}, not a positive whole number.")
    answer_in = options.pop("answer", "tags")
    if not isinstance(answer_in, str) or answer_in not in ANSWER_READERS:
        raise UserError(f"reasoning-gym:{argument}: answer is {answer_in!r}; it is one of {', '.join(ANSWER_READERS)}.")

    def problems(seed: int, size: int) -> list[dict[str, Any]]:
        try:
            generator = reasoning_gym.create_dataset(name, seed=seed, size=size, **options)
            # Some generators take seconds for one problem.
            return [generator[index] for index in tqdm(range(size), desc=name, leave=False, disable=None)]
        except Exception as error:  # each generator checks its options in its own way
            raise UserError(f"reasoning-gym:{argument}: {type(error).__name__}: {error}") from error

    def split(held_out: bool, conversational: bool) -> Dataset:
        entries = problems(_HELD_OUT_SEED, sizes["held_out_size"])
        if not held_out:
            taken = {entry["question"] for entry in entries}
            entries = [entry for entry in problems(_TRAIN_SEED, sizes["size"]) if entry["question"] not in taken]
            if not entries:
                raise UserError(f"reasoning-gym:{argument} has too few different problems to hold any out.")
        rows = [Row(entry, f"reasoning-gym:{name}[{index}]") for index, entry in enumerate(entries)]
        rows = keep_good_rows(rows, lambda candidates: _faults(name, options, candidates), name, bad_rows)
        return Dataset.from_dict(
            {
                "prompt": [_prompt(row.columns["question"], answer_in, conversational) for row in rows],
                "generator": [name] * len(rows),
                "config": [packed(options)] * len(rows),
                "entry": [packed(row.columns) for row in rows],
                "answer_in": [answer_in] * len(rows),
                # Rewards do not read it: it is what supervised finetuning completes a prompt with, where there is one.
                "answer": [None if (gold := row.columns["answer"]) is None else str(gold) for row in rows],
            }
        )

    in_tags = answer_in == "tags"
    return Task(
        name=f"reasoning-gym:{argument}",
        train=lambda conversational: split(False, conversational),
        held_out=lambda conversational: split(True, conversational),
        rewards=(reasoning_reward, *([WatchedFormatReward(reasoning_correct)] if in_tags else [])),
        correct=reasoning_correct,
        reward_weights=(1.0, FORMAT_WEIGHT) if in_tags else None,
        max_completion_length=512,
    )


def parse_options(argument: str) -> tuple[str, dict[str, Any]]:
    """`name,key=value,…` as the name and its options; values are Python literals, or else text.

    Raises:
        UserError: An option has no `=`.
    """
    name, *pairs = argument.split(",")
    options = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key.isidentifier():
            raise UserError(f"reasoning-gym:{argument}: {pair!r} is not of the form key=value.")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            options[key] = value
    return name, options


def _prompt(question: str, answer_in: str, conversational: bool) -> str | list[dict[str, str]]:
    if conversational:
        content = f"{question}\n\n{THINK_ANSWER_INSTRUCTION}" if answer_in == "tags" else question
        return [{"role": "user", "content": content}]
    instruction = f"{THINK_ANSWER_INSTRUCTION}\n\n" if answer_in == "tags" else ""
    return f"{instruction}Question: {question}\nResponse:"


def _faults(name: str, options: dict[str, Any], rows: Any) -> list[str | None]:
    """A row is bad when the generator has a gold answer and does not give it the full score."""
    golds = [row.columns["answer"] for row in rows]
    scores = reasoning_scores(
        [f"<answer>{gold}</answer>" for gold in golds],
        [name] * len(rows),
        [packed(options)] * len(rows),
        [packed(row.columns) for row in rows],
    )
    # Some generators state no gold answer (many are right): there is nothing to check then.
    return [
        None
        if gold is None or (not isinstance(score, str) and score >= 1.0 - 1e-9)
        else f"its own answer scores {score}"
        for gold, score in zip(golds, scores, strict=True)
    ]
