r"""GSM8K and MATH, in their published formats, with the math reward and the paper's format reward.

- `gsm8k`: columns `question`, `answer`; the gold answer follows the last `####`. Train on `train`, held out `test`.
- `math`: columns `problem` and `answer` (MATH-500), or `solution`, whose last `\boxed{}` is the gold answer. Train on
  `train`, held out `test`.

Of a lone file, as in `gsm8k:/data/rows.jsonl`, one row in eight is held out, always the same ones; one that is named
after a held-out split (`test.jsonl`) is held out whole, for evaluation.
"""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset

from mua_rl.envs.row_files import read_split
from mua_rl.envs.rows import Row, RowFault, column, convert_rows, keep_good_rows, to_dataset
from mua_rl.envs.tasks import Task, register_task
from mua_rl.rewards.extract_math import extract_answer
from mua_rl.rewards.format import THINK_ANSWER_INSTRUCTION, WatchedFormatReward
from mua_rl.rewards.math import gold_faults, math_reward, strict_math_reward

GSM8K_HUB = "openai/gsm8k"
MATH_HUB = "DigitalLearningGmbH/MATH-lighteval"

FORMAT_WEIGHT = 0.1
"""Weight of the format reward beside a right answer's 1, as in the muA paper's recipe."""


def math_prompt(question: str, conversational: bool) -> str | list[dict[str, str]]:
    """A question with the instruction to think first and answer in tags."""
    if conversational:
        return [{"role": "user", "content": f"{question}\n\n{THINK_ANSWER_INSTRUCTION}"}]
    return f"{THINK_ANSWER_INSTRUCTION}\n\nQuestion: {question}\nResponse:"


def math_dataset(
    rows: Sequence[Row], read: Callable[[Row], dict[str, Any]], task: str, bad_rows: str, conversational: bool
) -> Dataset:
    """Prompts and `answer` of the rows whose gold answer can be read and equals itself.

    Args:
        rows: One split, as read.
        read: Gives a row's `question` and `answer`; raises `RowFault`.
        task, bad_rows: As for `keep_good_rows`.
        conversational: Whether prompts are messages.
    """
    problems = keep_rows_with_golds(convert_rows(rows, read), task, bad_rows)
    prompts = [math_prompt(row.columns["question"], conversational) for row in problems]
    return to_dataset({"prompt": prompts, "answer": gold_column(problems)}, task)


def golds(row: Row) -> list[Any]:
    """The gold answers in a row's column `answer`: one, or a list of several, any of which is right.

    Raises:
        RowFault: There is none.
    """
    answer = column(row, "answer", (str, int, float, list))
    answers = answer if isinstance(answer, list) else [answer]
    return [column(Row({"answer": one}, row.place), "answer", (str, int, float)) for one in answers]


def keep_rows_with_golds(rows: Sequence[Row], task: str, bad_rows: str) -> list[Row]:
    """The rows all of whose gold answers (`golds`) can be read and equal themselves."""

    def check(candidates: Sequence[Row]) -> list[str | None]:
        faults = iter(gold_faults([gold for row in candidates for gold in row.columns["answer"]]))
        of_rows = [[next(faults) for _ in row.columns["answer"]] for row in candidates]
        return [next((fault for fault in of_row if fault is not None), None) for of_row in of_rows]

    return keep_good_rows(rows, check, task, bad_rows)


def gold_column(rows: Sequence[Row]) -> list[str] | list[list[str]]:
    """The column `answer` of a dataset: texts, or, if any row has several gold answers, lists of them."""
    answers = [list(map(str, row.columns["answer"])) for row in rows]
    return [answer[0] for answer in answers] if all(len(answer) == 1 for answer in answers) else answers


def math_task(
    name: str, train: Callable[[bool], Dataset], held_out: Callable[[bool], Dataset], max_completion_length: int
) -> Task:
    """A task with the math reward, the paper's format reward, and the strict final-answer form as its `strict`."""
    return Task(
        name=name,
        train=train,
        held_out=held_out,
        rewards=(math_reward, WatchedFormatReward(math_reward)),
        correct=math_reward,
        reward_weights=(1.0, FORMAT_WEIGHT),
        max_completion_length=max_completion_length,
        strict=strict_math_reward,
    )


@register_task("gsm8k")
def gsm8k(argument: str | None = None, bad_rows: str = "skip") -> Task:
    """Grade-school word problems (Cobbe et al. 2021)."""

    def split(names: tuple[str, ...], conversational: bool) -> Dataset:
        rows = read_split(argument or GSM8K_HUB, names, config="main", key=("question",))
        return math_dataset(rows, gsm8k_problem, "gsm8k", bad_rows, conversational)

    return math_task(
        "gsm8k",
        lambda conversational: split(("train",), conversational),
        lambda conversational: split(("test", "validation"), conversational),
        max_completion_length=512,
    )


@register_task("math")
def math(argument: str | None = None, bad_rows: str = "skip") -> Task:
    """Competition problems (Hendrycks et al. 2021)."""

    def split(names: tuple[str, ...], conversational: bool) -> Dataset:
        rows = read_split(argument or MATH_HUB, names, key=("problem",))
        return math_dataset(rows, math_problem, "math", bad_rows, conversational)

    return math_task(
        "math",
        lambda conversational: split(("train",), conversational),
        lambda conversational: split(("test",), conversational),
        max_completion_length=1024,
    )


def gsm8k_problem(row: Row) -> dict[str, Any]:
    """Question and gold answer, in a list, of a GSM8K row."""
    _, mark, gold = column(row, "answer").rpartition("####")
    if not mark:
        raise RowFault("column 'answer' has no '####' before the final answer")
    return {"question": column(row, "question"), "answer": [gold.strip()]}


def math_problem(row: Row) -> dict[str, Any]:
    """Question and gold answers of a MATH row."""
    question = column(row, "problem")
    if "answer" in row.columns:
        return {"question": question, "answer": golds(row)}
    extract = extract_answer(column(row, "solution"))
    if extract is None or extract.marker != "boxed":
        raise RowFault("column 'solution' has no finished \\boxed{}")
    return {"question": question, "answer": [extract.text]}
