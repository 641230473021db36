"""The registry of verifiable text tasks: `--task SPEC` looks a task up here.

A spec is a name, and for some tasks a colon and an argument:

| spec | task |
|---|---|
| `arithmetic` | sums and products; embedded |
| `differences` | differences, which the embedded model has not learnt; embedded |
| `one-liners` | one-line Python functions with tests; embedded |
| `gsm8k`, `math`, `mbpp`, `humaneval` | the published datasets from the hub |
| `mbppplus`, `humanevalplus`, `apps`, `taco`, `livecodebench` | published datasets of code, in the hub's formats |
| `gsm8k:PATH`, `math:PATH`, … | the same from a local folder or file (JSONL, JSON, parquet), or from the hub id PATH |
| `mbpp:PATH,seconds=10,modules=numpy+scipy` | a code task with options of its sandbox |
| `jsonl:PATH` | rows of `prompt` and `answer`, or of `prompt` and `tests`, of your own |
| `reasoning-gym:NAME`, `reasoning-gym:NAME,key=value,…` | a generator of that library, scored by its own scorer |
| `path/to/file.py:NAME` | a task of your own: what `@register_task("NAME")` decorates in that file |

Of a lone file one row in eight is held out, always the same ones.

A task is prompts plus the verifier that scores completions. Adding one takes a function and a decorator:

    from mua_rl.envs.tasks import Task, register_task

    @register_task("my-task")
    def my_task() -> Task: ...

Rows that cannot be scored (no tests, no readable answer, a missing column) are never scored silently: they are skipped
with a report of file and line, or, with `bad_rows="refuse"`, end the program (`mua_rl.envs.rows`).
"""

import functools
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from datasets import Dataset

from mua_rl.envs.sandbox_options import split_options
from mua_rl.errors import UserError, one_line

RewardFunc = Callable[..., list[float | None]]
"""TRL's reward signature: `f(prompts, completions, **columns) -> list of one score per completion`."""


@dataclass(frozen=True)
class Task:
    """A verifiable text task.

    Attributes:
        name: What `--task` takes.
        train, held_out: Build the two disjoint splits. Each row has a `prompt` (a string, or a list of chat messages)
            and the columns that the rewards read. They take `conversational`: whether the policy's tokenizer has a
            chat template, so that prompts should be messages.
        rewards: Rewards to train on, summed with `reward_weights`.
        correct: 1.0 for a right answer, else 0.0: the accuracy that is reported on both splits.
        max_completion_length: Tokens that a right answer fits in; the default of `--max_completion_length`.
        strict: A stricter `correct` for held-out answers: what only `correct` accepts may be reward hacking.
    """

    name: str
    train: Callable[[bool], Dataset]
    held_out: Callable[[bool], Dataset]
    rewards: tuple[RewardFunc, ...]
    correct: RewardFunc
    reward_weights: tuple[float, ...] | None = None
    max_completion_length: int = 256
    strict: RewardFunc | None = None

    @property
    def checked_rewards(self) -> list[RewardFunc]:
        """`rewards`, each `checked`, for trainers."""
        return [checked(reward, self.name) for reward in self.rewards]


# Modules that register the tasks of this package, imported when one of them is asked for.
_BUILT_IN = {
    "arithmetic": "mua_rl.envs.arithmetic",
    "easy-arithmetic": "mua_rl.envs.arithmetic",
    "differences": "mua_rl.envs.arithmetic",
    "gsm8k": "mua_rl.envs.math_tasks",
    "math": "mua_rl.envs.math_tasks",
    "reasoning-gym": "mua_rl.envs.reasoning_tasks",
    "humaneval": "mua_rl.envs.code_tasks",
    "mbpp": "mua_rl.envs.code_tasks",
    "humanevalplus": "mua_rl.envs.code_tasks",
    "mbppplus": "mua_rl.envs.code_tasks",
    "apps": "mua_rl.envs.contest_tasks",
    "taco": "mua_rl.envs.contest_tasks",
    "livecodebench": "mua_rl.envs.contest_tasks",
    "one-liners": "mua_rl.envs.code_tasks",
    "jsonl": "mua_rl.envs.jsonl_tasks",
}
_CODE_FILES = ("mbpp", "humaneval", "mbppplus", "humanevalplus", "apps", "taco", "livecodebench", "jsonl")
_READ_FILES = ("gsm8k", "math", *_CODE_FILES)  # their argument may be a path
_TASKS: dict[str, Callable[..., Task]] = {}


def register_task(name: str) -> Callable[[Callable[..., Task]], Callable[..., Task]]:
    """Decorator: `build()` makes the task `name`. A later registration of the same name replaces the earlier one.

    A builder that takes an `argument` gets what follows the colon in the spec, or `None`; one that takes `bad_rows` or
    `isolation` gets that option of `get_task`.
    """

    def register(build: Callable[..., Task]) -> Callable[..., Task]:
        _TASKS[name] = build
        return build

    return register


def task_names() -> list[str]:
    """Names of the tasks, sorted."""
    return sorted({*_TASKS, *_BUILT_IN})


def get_task(spec: str, bad_rows: str = "skip", isolation: str = "strong") -> Task:
    """Build the task of a spec.

    Args:
        spec: `NAME`, `NAME:ARGUMENT` or `path/to/file.py:NAME`.
        bad_rows: "skip" leaves out rows that cannot be scored, and reports them; "refuse" raises at the first.
        isolation: How programs are kept apart from the machine in code tasks (`mua_rl.rewards.code`): "strong", or the
            weaker "process".

    Raises:
        UserError: No task has that name, its argument is unusable, or (in `train` and `held_out`, which read the rows)
            its data is.
    """
    if bad_rows not in ("skip", "refuse"):
        raise UserError(f"bad_rows is 'skip' or 'refuse', not {bad_rows!r}.")
    name, argument = _split_spec(spec)
    if name not in _TASKS and name in _BUILT_IN:
        importlib.import_module(_BUILT_IN[name])
    if name not in _TASKS:
        raise UserError(f"there is no task {name!r}; the tasks are: {', '.join(task_names())}.")
    build = _TASKS[name]
    options: dict[str, Any] = {"argument": argument, "bad_rows": bad_rows, "isolation": isolation}
    accepted = inspect.signature(build).parameters
    if argument is not None and "argument" not in accepted:
        raise UserError(f"the task {name!r} takes no argument, but {spec!r} gives one.")
    given = {key: value for key, value in options.items() if key in accepted}
    with own_code(f"the task {spec!r}"):
        task = build(**given)
    if not isinstance(task, Task):
        raise UserError(f"what registers the task {spec!r} returns a {type(task).__name__}, not a Task.")
    return task


@contextmanager
def own_code(what: str) -> Iterator[None]:
    """A fault in somebody's task or reward is named in one line, with the place in its file.

    Args:
        what: Of whom, for the message.

    Raises:
        UserError: The code in the block raised something else than a `UserError`.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        reason = one_line(f"{type(error).__name__}: {error}")
        raise UserError(f"{what} failed: {reason} ({last.filename}:{last.lineno}).") from error


RESERVED_COLUMNS = ("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric")
"""Arguments by which TRL's trainer and our evaluations hand rewards something else than a column."""


def load_split(task: Task, held_out: bool, conversational: bool) -> Dataset:
    """The rows of one split of a task.

    Args:
        task: Any task, perhaps somebody's own.
        held_out: Which split.
        conversational: Whether prompts are to be chat messages.

    Raises:
        UserError: The task fails, or gives no rows with a prompt, or a column whose name rewards get something else by.
    """
    with own_code(f"the task {task.name}"):
        rows = (task.held_out if held_out else task.train)(conversational)
    what = f"the {'held-out' if held_out else 'train'} split of the task {task.name}"
    if not isinstance(rows, Dataset):
        raise UserError(f"{what} is a {type(rows).__name__}, not a Dataset.")
    if "prompt" not in rows.column_names or len(rows) == 0:
        raise UserError(f"{what} has no rows with a column 'prompt'.")
    if taken := [name for name in RESERVED_COLUMNS if name in rows.column_names]:
        raise UserError(
            f"{what} has a column {taken[0]!r}, and rewards get something else by that name: rename the column "
            f"(rows.rename_column({taken[0]!r}, ...)), or remove it."
        )
    return rows


def as_completions(prompts: Sequence, texts: Sequence[str]) -> list:
    """A policy's answers as rewards get them in training: where prompts are chat messages, as messages too."""
    if isinstance(prompts[0], str):
        return list(texts)
    return [[{"role": "assistant", "content": text}] for text in texts]


def checked(reward: RewardFunc, task: str) -> RewardFunc:
    """A reward whose faults, and results that are no scores, are a `UserError`; a coroutine is left as it is."""
    is_coroutine: bool = inspect.iscoroutinefunction(reward)
    if is_coroutine:
        return reward
    name = getattr(reward, "__name__", type(reward).__name__)

    @functools.wraps(reward)
    def score(*args: Any, **columns: Any) -> list[float | None]:
        with own_code(f"the reward {name} of the task {task}"):
            given = reward(*args, **columns)
        try:
            scores = [None if score is None else float(score) for score in given]
        except (TypeError, ValueError):
            raise UserError(
                f"the reward {name} of the task {task} gives no list of scores: {one_line(repr(given), 80)}"
            ) from None
        wanted = len(columns["completions"])
        if len(scores) != wanted:
            raise UserError(f"the reward {name} of the task {task} gives {len(scores)} scores for {wanted} answers.")
        if not all(score is None or math.isfinite(score) for score in scores):
            raise UserError(f"the reward {name} of the task {task} gives a score that is not finite; None is for none.")
        return scores

    return score


def with_whole_path(spec: str) -> str:
    """A spec that means the same from any folder: the path in it, if there is one, made absolute."""
    file, found, name = spec.rpartition(".py:")
    if found and (path := Path(f"{file}.py")).exists():
        return f"{path.resolve()}:{name}"
    name, _, argument = spec.partition(":")
    where, options = split_options(argument) if name in _CODE_FILES else (argument, "")
    if name in _READ_FILES and where and (path := Path(where).expanduser()).exists():
        return f"{name}:{path.resolve()}{options and ','}{options}"
    return spec


def _split_spec(spec: str) -> tuple[str, str | None]:
    file, found, name = spec.rpartition(".py:")
    if found:
        path = Path(f"{file}.py")
        _import_file(path)
        if name not in _TASKS:
            raise UserError(f"{path} registers no task {name!r}; it needs a function under @register_task({name!r}).")
        return name, None
    name, found, argument = spec.partition(":")
    if found and not argument:
        raise UserError(f"the task spec {spec!r} ends with a colon: say what follows, or leave the colon out.")
    return name, argument or None


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"there is no task file {path}.")
    # Registered under its full path, so that rewards defined in it can be pickled by reference.
    module_name = f"mua_rl_task_{path.resolve().as_posix().replace('/', '_').replace('.', '_')}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise UserError(f"the task file {path} cannot be imported: {type(error).__name__}: {error}") from error
    return module
