"""Evaluation of a checkpoint on a task's held-out problems, recorded problem by problem and resumable.

An evaluation is a folder:

- `settings.json`: what was asked for. Going on with an evaluation needs the same settings.
- `problems.jsonl`: one line per problem: `index`, `prompt`, `completions`, `scores`, and `strict_scores` where the task
  has a stricter verifier.
- `summary.json`: pass@1, pass@k and their intervals, when all problems are done.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mua_rl.envs.tasks import RewardFunc, Task, as_completions, checked, load_split
from mua_rl.errors import UserError
from mua_rl.evaluation.engines import Engine
from mua_rl.evaluation.statistics import Estimate, PairedDifference, mean_estimate, paired_difference, pass_at_k
from mua_rl.files import write_whole

PROBLEMS_AT_ONCE = 16
"""Problems answered, scored and written together. The seed of each such chunk is its own, so that a resumed evaluation
draws what an uninterrupted one would have."""


@dataclass(frozen=True)
class Settings:
    """What was evaluated, and how; all of it goes into `settings.json`."""

    model: str
    adapter: str | None
    task: str
    samples: int
    temperature: float
    max_tokens: int
    engine: str
    seed: int
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.samples < 1 or self.max_tokens < 1 or (self.limit is not None and self.limit < 1):
            raise UserError("samples, max tokens and the limit must be at least 1.")
        if not self.temperature >= 0:
            raise UserError(f"a temperature is 0 or more, not {self.temperature}.")
        if self.temperature == 0 and self.samples > 1:
            raise UserError("at temperature 0 all samples are the same: take 1 sample, or a temperature above 0.")


@dataclass(frozen=True)
class Evaluation:
    """A finished or unfinished evaluation, as its folder has it."""

    settings: dict[str, Any]
    problems: list[dict[str, Any]]

    @property
    def shares(self) -> list[float]:
        """Share of right answers to each problem: its pass@1."""
        return [sum(problem["scores"]) / len(problem["scores"]) for problem in self.problems]

    def pass_at(self, k: int) -> Estimate:
        """Unbiased pass@k over problems with its 95% interval."""
        values = [pass_at_k(len(p["scores"]), round(sum(p["scores"])), k) for p in self.problems]
        return mean_estimate(values)

    def strict(self) -> Estimate | None:
        """pass@1 under the stricter verifier, for a task that has one."""
        if not self.problems or "strict_scores" not in self.problems[0]:
            return None
        return mean_estimate([sum(p["strict_scores"]) / len(p["strict_scores"]) for p in self.problems])

    def summary(self, ks: Sequence[int]) -> dict[str, Any]:
        """All figures, as `summary.json` has them."""
        strict = self.strict()
        return {
            **self.settings,
            "problems": len(self.problems),
            "pass": {str(k): asdict(self.pass_at(k)) for k in ks},
            **({"strict": asdict(strict)} if strict else {}),
        }


def default_ks(samples: int) -> list[int]:
    """The k of pass@k that are reported: 1, and the powers of two and the number of samples up to it."""
    return sorted({samples, *(2**i for i in range(samples.bit_length()) if 2**i <= samples)})


def evaluate(task: Task, engine: Engine, settings: Settings, folder: Path) -> Evaluation:
    """Answer and score the held-out problems that `folder` does not have yet, and write the summary.

    Raises:
        UserError: The folder holds an evaluation with other settings, or of other problems; the task fails.
    """
    rows = load_split(task, True, engine.conversational)
    if settings.limit is not None:
        rows = rows.select(range(min(settings.limit, len(rows))))
    _open_folder(folder, settings)
    done = _read_problems(folder / "problems.jsonl")
    done = done[: len(done) // PROBLEMS_AT_ONCE * PROBLEMS_AT_ONCE] if len(done) < len(rows) else done
    for i, problem in enumerate(done):
        if i >= len(rows) or problem["key"] != problem_key(rows[i]["prompt"]):
            raise UserError(
                f"{folder} holds answers to other problems (line {i + 1} of problems.jsonl): take a new one."
            )
    _write_problems(folder / "problems.jsonl", done)  # drops a line that an interruption tore, and its chunk
    with (folder / "problems.jsonl").open("a", encoding="utf-8") as file:
        starts = range(len(done), len(rows), PROBLEMS_AT_ONCE)
        for start in tqdm(starts, desc=task.name, unit="chunk", disable=None):
            indices = range(start, min(start + PROBLEMS_AT_ONCE, len(rows)))
            chunk = rows.select(indices)
            completions = engine.answer(list(chunk["prompt"]), settings.samples, settings.seed + start)
            problems = _score(task, chunk, completions, start)
            file.write("".join(json.dumps(problem) + "\n" for problem in problems))
            file.flush()
            done += problems
    evaluation = Evaluation(asdict(settings), done)
    _write_json(folder / "summary.json", evaluation.summary(default_ks(settings.samples)))
    return evaluation


def load_evaluation(folder: Path) -> Evaluation:
    """Read a finished evaluation.

    Raises:
        UserError: The folder holds none, or an unfinished one.
    """
    try:
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(f"{folder} holds no evaluation (no settings.json).") from None
    if not (folder / "summary.json").exists():
        raise UserError(f"the evaluation in {folder} is unfinished: run it again to go on with it.")
    return Evaluation(settings, _read_problems(folder / "problems.jsonl"))


def compare(first: Evaluation, second: Evaluation) -> PairedDifference:
    """The paired difference in pass@1, second minus first.

    Raises:
        UserError: The evaluations are not of the same problems.
    """
    keys_first, keys_second = ([p["key"] for p in evaluation.problems] for evaluation in (first, second))
    if sorted(keys_first) != sorted(keys_second):
        raise UserError(
            f"the two evaluations are not of the same problems ({len(keys_first)} of {first.settings['task']}, "
            f"{len(keys_second)} of {second.settings['task']})."
        )
    # Sorted alike, so that the order of the rows does not matter; a prompt that occurs twice pairs with itself.
    shares_first, shares_second = (
        [share for _, share in sorted(zip(keys, evaluation.shares, strict=True), key=lambda pair: pair[0])]
        for keys, evaluation in ((keys_first, first), (keys_second, second))
    )
    return paired_difference(shares_first, shares_second)


def problem_key(prompt: str | list[dict[str, str]]) -> str:
    """A short name of a problem, by which two evaluations are paired."""
    text = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _score(task: Task, rows: Any, completions: list[list[str]], start: int) -> list[dict[str, Any]]:
    samples = len(completions[0])
    columns = {name: [value for value in rows[name] for _ in range(samples)] for name in rows.column_names}
    prompts = columns.pop("prompt")
    flat = as_completions(prompts, [completion for group in completions for completion in group])

    def scores_of(verifier: RewardFunc) -> list[float]:
        return [
            float(score == 1.0) for score in checked(verifier, task.name)(prompts=prompts, completions=flat, **columns)
        ]

    scores = scores_of(task.correct)
    strict = scores_of(task.strict) if task.strict else None
    problems = []
    for i, group in enumerate(completions):
        own = slice(i * samples, (i + 1) * samples)
        problem: dict[str, Any] = {
            "index": start + i,
            "key": problem_key(rows[i]["prompt"]),
            "prompt": rows[i]["prompt"],
            "completions": group,
            "scores": scores[own],
        }
        if strict is not None:
            problem["strict_scores"] = strict[own]
        problems.append(problem)
    return problems


def _open_folder(folder: Path, settings: Settings) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder {folder} cannot be made: {error.strerror}.") from None
    path = folder / "settings.json"
    if not path.exists():
        if any(folder.iterdir()):
            raise UserError(f"{folder} is not empty and holds no evaluation: take another folder.")
        _write_json(path, asdict(settings))
        return
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise UserError(f"{path} is not JSON: remove it, or take another folder.") from None
    now = asdict(settings)
    changed = [f"{name} was {before.get(name)!r}, is {now[name]!r}" for name in now if before.get(name) != now[name]]
    if changed:
        raise UserError(
            f"{folder} holds an evaluation with other settings ({'; '.join(changed)}): take another folder."
        )


def _read_problems(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    problems: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            problem = json.loads(line)
        except ValueError:  # torn by an interruption, or the end
            break
        if not isinstance(problem, dict) or problem.get("index") != len(problems):
            break
        problems.append(problem)
    return problems


def _write_problems(path: Path, problems: list[dict[str, Any]]) -> None:
    write_whole(path, "".join(json.dumps(problem) + "\n" for problem in problems))


def _write_json(path: Path, value: Any) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")
