r"""The math reward: 1 for a completion whose final answer equals the gold answer, else 0.

Three steps, each in its own module: `extract_math` finds the answer, `numbers` compares plain numbers exactly, and
`math_worker` asks Math-Verify, in a process that can be killed, about everything else.

What counts as equal, beyond the conventions of `numbers` and Math-Verify (tests/test_math_agreement.py lists where the
verdicts differ from Math-Verify's own, and why):

- Against a gold that is a plain number only a number is an answer: `72` or `x = 72`, not `48+24` or `3^5`, which may
  be the question copied down.
- Against an integer in a base (`12_8`) an answer has the same digits and the same base, or no base: the question names
  it. The same value in another base is no answer, nor is such an integer one against a plain number.
- Against amounts (`3 feet 4 inches`, `7 R 2`) and dates an answer has the same numbers with the same words.
- Against any other gold, Math-Verify decides on the extracted answer alone. Tuples are ordered, sets are not; units
  and percent signs are ignored; decimals must agree to one in a million.
- The same text, up to spaces, is equal without further question; words (`yes`, `no solution`) are compared as words,
  up to case.
"""

import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import StrEnum
from fractions import Fraction
from functools import lru_cache
from typing import Any

from mua_rl.rewards.completions import completion_text
from mua_rl.rewards.extract_math import MAX_ANSWER_CHARS, extract_answer
from mua_rl.rewards.numbers import (
    NumberInBase,
    PlainNumber,
    parse_amounts,
    parse_in_base,
    parse_number,
    same_number,
)
from mua_rl.rewards.worker_pool import Failure, WorkerPool, shared_pool

WORKER_MODULE = "mua_rl.rewards.math_worker"


class MathVerdict(StrEnum):
    """Why an answer scores what it scores. Only `RIGHT` scores 1; `BAD_GOLD` is no score at all."""

    RIGHT = "right"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    """The completion has no marked answer and no last number, or (strict) not in the strict form."""
    UNREADABLE = "unreadable"
    """An answer is there, but it is too long or no mathematics."""
    TIMEOUT = "timeout"
    """Comparing took longer than the pool's limit."""
    KILLED = "killed"
    """The worker crashed on the answer, twice."""
    MEMORY = "memory"
    """The worker reached its memory limit on the answer."""
    BAD_GOLD = "bad_gold"
    """The gold answer does not equal itself: the row is at fault."""


class _VerdictCache:
    """Verdicts by (gold, answer): a group of completions repeats its answers, and so does a stalling policy."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._verdicts: OrderedDict[tuple[str, str], MathVerdict] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, pair: tuple[str, str]) -> MathVerdict | None:
        with self._lock:
            return self._verdicts.get(pair)

    def put(self, pair: tuple[str, str], verdict: MathVerdict) -> None:
        with self._lock:
            self._verdicts[pair] = verdict
            if len(self._verdicts) > self._size:
                self._verdicts.popitem(last=False)


_cache = _VerdictCache(65536)


def judge_completions(
    completions: Sequence[Any], golds: Sequence[Any], *, strict: bool = False, pool: WorkerPool | None = None
) -> list[MathVerdict]:
    r"""A verdict for each completion.

    Args:
        completions: Strings or conversations (`completion_text` reads them).
        golds: The gold answers alone (`72`, `\frac{1}{2}`, with or without `$…$`), one per completion, or a list of
            several, any of which is right.
        strict: Require the exact final-answer form: a `\boxed{}`, `####` or `<answer>`, the only one of its kind, with
            nothing after it. A completion that wins by the ordinary rules only is a sign of reward hacking.
        pool: Where Math-Verify runs; the process's shared pool by default.

    Raises:
        GraderFault: The workers do not start.
    """
    if any(isinstance(gold, (list, tuple)) for gold in golds):
        return _judge_against_several(completions, golds, strict, pool)
    pairs: list[tuple[str, str]] = []
    verdicts: list[MathVerdict | None] = []
    for completion, gold in zip(completions, golds, strict=True):
        extract = extract_answer(completion_text(completion))
        if extract is None or (strict and not extract.final):
            # Nothing to compare, but a bad gold must not pass for a wrong answer.
            verdicts.append(MathVerdict.BAD_GOLD if _gold_text(gold) is None else MathVerdict.NO_ANSWER)
            pairs.append(("", ""))
        else:
            verdicts.append(None)
            pairs.append((_gold_text(gold) or "", extract.text))
    open_indices = [i for i, verdict in enumerate(verdicts) if verdict is None]
    judged = judge_answers([pairs[i] for i in open_indices], pool=pool)
    for i, verdict in zip(open_indices, judged, strict=True):
        verdicts[i] = verdict
    return [verdict for verdict in verdicts if verdict is not None]


def _judge_against_several(
    completions: Sequence[Any], golds: Sequence[Any], strict: bool, pool: WorkerPool | None
) -> list[MathVerdict]:
    of_rows = [list(gold) or [None] if isinstance(gold, (list, tuple)) else [gold] for gold in golds]
    repeated = [completion for completion, row in zip(completions, of_rows, strict=True) for _ in row]
    judged = iter(judge_completions(repeated, [gold for row in of_rows for gold in row], strict=strict, pool=pool))
    verdicts = [[next(judged) for _ in row] for row in of_rows]
    # Right, else the row's fault, else the first verdict.
    ranks = {MathVerdict.RIGHT: 0, MathVerdict.BAD_GOLD: 1}
    return [min(row, key=lambda verdict: ranks.get(verdict, 2)) for row in verdicts]


def judge_answers(pairs: Sequence[tuple[str, str]], *, pool: WorkerPool | None = None) -> list[MathVerdict]:
    """A verdict for each (gold, answer) pair of extracted texts, in order.

    Raises:
        GraderFault: The workers do not start.
    """
    verdicts = [_quick_verdict(gold, answer) for gold, answer in pairs]
    slow = {pair: _cache.get(pair) for pair, verdict in zip(pairs, verdicts, strict=True) if verdict is None}
    unknown = [pair for pair, verdict in slow.items() if verdict is None]
    if unknown:
        for pair, verdict in zip(unknown, _ask_math_verify(unknown, pool), strict=True):
            slow[pair] = verdict
            _cache.put(pair, verdict)
    return [verdict or slow[pair] for pair, verdict in zip(pairs, verdicts, strict=True)]  # type: ignore[misc]


def gold_fault(gold: Any, *, pool: WorkerPool | None = None) -> str | None:
    """What is wrong with a gold answer, or `None` for a good one: it can be read, and it equals itself.

    Call it on every row when a dataset is loaded (`mua_rl.envs` does): a gold that cannot be read would score every
    completion 0.
    """
    return gold_faults([gold], pool=pool)[0]


def gold_faults(golds: Sequence[Any], *, pool: WorkerPool | None = None) -> list[str | None]:
    """`gold_fault` for many golds at once, on all workers."""
    texts = [_gold_text(gold) for gold in golds]
    slow = list(dict.fromkeys(text for text in texts if text is not None and not _is_number(text)))
    names = dict(zip(slow, _ask_math_verify([(text, text) for text in slow], pool), strict=True))
    faults: list[str | None] = []
    for gold, text in zip(golds, texts, strict=True):
        if text is None:
            faults.append(f"no usable answer: {_shorten(gold)}")
        elif names.get(text, MathVerdict.RIGHT) is not MathVerdict.RIGHT:
            faults.append(f"Math-Verify does not find the answer equal to itself ({names[text]}): {_shorten(text)}")
        else:
            faults.append(None)
    return faults


def math_reward(
    prompts: Sequence[Any] | None = None,
    completions: Sequence[Any] = (),
    answer: Sequence[Any] = (),
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""Score 1.0 for each completion whose final answer equals `answer`, else 0.0; `None` where the gold is unusable.

    A TRL reward function. Total in the completions: no text, length or type raises or scores above 0 by accident.

    Args:
        prompts: Not used.
        completions: Strings or conversations.
        answer: Gold answers, one per completion, or lists of several: the dataset's `answer` column.
        log_metric: TRL's logger; gets `math/timeout`, `math/error`, `math/no_answer` and `math/unreadable`, each the
            fraction of this batch.
        columns: Other columns, not used.

    Raises:
        GraderFault: Math-Verify does not start; it is never scored 0 silently.

    Example:
        >>> math_reward(completions=[r"So \boxed{\frac{2}{4}}.", "#### 7"], answer=["1/2", "72"])
        [1.0, 0.0]
    """
    verdicts = judge_completions(completions, answer)
    if log_metric is not None and verdicts:
        for name, counted in _METRICS.items():
            log_metric(name, sum(verdict in counted for verdict in verdicts) / len(verdicts))
    return _scores(verdicts)


def strict_math_reward(
    prompts: Sequence[Any] | None = None,
    completions: Sequence[Any] = (),
    answer: Sequence[Any] = (),
    **columns: Any,
) -> list[float | None]:
    """`math_reward` for the strict final-answer form only (`judge_completions`): the held-out check on a policy."""
    return _scores(judge_completions(completions, answer, strict=True))


def _ask_math_verify(pairs: Sequence[tuple[str, str]], pool: WorkerPool | None) -> list[MathVerdict]:
    replies = (pool or shared_pool(WORKER_MODULE)).ask(pairs) if pairs else []
    return [MathVerdict.UNREADABLE if reply is Failure.ERROR else MathVerdict(reply) for reply in replies]


_METRICS = {
    "math/timeout": (MathVerdict.TIMEOUT,),
    "math/error": (MathVerdict.KILLED, MathVerdict.MEMORY),
    "math/no_answer": (MathVerdict.NO_ANSWER,),
    "math/unreadable": (MathVerdict.UNREADABLE,),
}


def _scores(verdicts: Sequence[MathVerdict]) -> list[float | None]:
    return [None if verdict is MathVerdict.BAD_GOLD else float(verdict is MathVerdict.RIGHT) for verdict in verdicts]


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _gold_text(gold: Any) -> str | None:
    """The gold as text; `None` for one that no answer could equal."""
    if isinstance(gold, bool) or (isinstance(gold, float) and not math.isfinite(gold)):
        return None
    if isinstance(gold, (int, float)):
        return str(gold) if abs(gold) < 10**300 else None
    if not isinstance(gold, str) or not gold.strip() or len(gold) > MAX_ANSWER_CHARS:
        return None
    return gold.strip()


def _quick_verdict(gold: str, answer: str) -> MathVerdict | None:
    """The verdict that needs no symbolic algebra, or `None`."""
    if not gold:
        return MathVerdict.BAD_GOLD
    if len(answer) > MAX_ANSWER_CHARS:
        return MathVerdict.UNREADABLE
    gold_number = parse_number(gold)
    if gold_number is not None:
        number = _stated_number(answer)
        return MathVerdict.RIGHT if number and same_number(gold_number, number) else MathVerdict.WRONG
    in_base = parse_in_base(gold)
    if in_base is not None:  # Math-Verify leaves the subscript out, so that `12_9` were `12_8`
        return MathVerdict.RIGHT if _states(answer, in_base) else MathVerdict.WRONG
    left, right = _bare(gold), _bare(answer)
    if left == right:
        return MathVerdict.RIGHT
    if _WORDS.fullmatch(left) and _WORDS.fullmatch(right):  # to Math-Verify products, so that `stop` were `post`
        return MathVerdict.RIGHT if left.casefold() == right.casefold() else MathVerdict.WRONG
    amounts = parse_amounts(gold)  # to Math-Verify a product: `3 feet 4 inches` were `4 feet 3 inches`
    if amounts is not None:
        return MathVerdict.RIGHT if parse_amounts(answer.rpartition("=")[2]) == amounts else MathVerdict.WRONG
    if _DATE.fullmatch(left):  # to Math-Verify a difference or a quotient
        same = _DATE.fullmatch(right) and _date_parts(left) == _date_parts(right)
        return MathVerdict.RIGHT if same else MathVerdict.WRONG
    return None


def _date_parts(date: str) -> list[int]:
    return [int(part) for part in re.split("[-/]", date)]


def _is_number(text: str) -> bool:
    """Whether a gold is compared without Math-Verify."""
    return parse_number(text) is not None or parse_in_base(text) is not None


def _states(answer: str, gold: NumberInBase) -> bool:
    """Whether an answer states an integer in a base: `12_8`, `x = 12_8`, or without the base."""
    is_open = "=" in answer and _STATES_NO_NUMBER.search(answer)
    found = None if is_open else parse_in_base(answer.rpartition("=")[2], gold.base)
    if found is not None:
        return found == gold
    number = _stated_number(answer)  # `1,101`
    return number is not None and gold.digits.isdecimal() and same_number(PlainNumber(Fraction(gold.digits)), number)


def _bare(text: str) -> str:
    return "".join(text.split()).strip("$.")


_WORDS = re.compile(r"[A-Za-z]{3,}")
_DATE = re.compile(r"[0-9]{4}([-/])[0-9]{1,2}\1[0-9]{1,2}|[0-9]{1,2}([-/])[0-9]{1,2}\2[0-9]{4}")
_STATES_NO_NUMBER = re.compile(  # but a choice, or a bound: `x >= 5`, `x != 5` (where `5! = 120` states one)
    r"[,;<>≠≤≥]|\\\\|[A-Za-z]\s*!=|\b(?:or|and)\b"
    r"|\\(?:lor|vee|land|wedge|q?quad|pm|mp|text|mbox|mathrm|not|ne|neq|[lg]t|[lg]eq?|[lg]eqq|[lg]eqslant)(?![A-Za-z])"
)
_BRACKETS = (("\\{", "\\}"), ("(", ")"))


@lru_cache(maxsize=65536)
def _stated_number(answer: str) -> PlainNumber | None:
    r"""The number an answer states: the text itself, `x = 5`, `x = 2 + 3 = 5`, `5 \approx 5.0`, `\{5\}`, `(5)`."""
    number = parse_number(answer)
    if number is not None:
        return number
    text = answer.strip().strip("$").strip().replace("\\left", "").replace("\\right", "")
    if _STATES_NO_NUMBER.search(text):
        return None
    # An approximation follows the exact value, unless only a name stands before it.
    sides = re.split(r"\\approx|≈", text, maxsplit=1)
    before = parse_number(sides[0].rpartition("=")[2])
    if before is not None:
        return before
    text = sides[-1].rpartition("=")[2].strip()
    for left, right in _BRACKETS:
        if text.startswith(left) and text.endswith(right):
            text = text[len(left) : -len(right)]
    return parse_number(text)
