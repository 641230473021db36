r"""The math reward: 1 for a completion whose final answer equals the gold answer, else 0.

Three steps, each in its own module: `extract_math` finds the answer, `math_quick` compares what needs no algebra, and
`math_worker` asks Math-Verify, in a process that can be killed, about everything else.

What counts as equal (docs/math_verdicts.md has every difference from Math-Verify, and why):

- How an answer looks is not what it says: `latex` takes fonts, sizes, colours, spaces and needless braces away.
- Against a gold that is a plain number (`numbers`) only a number is an answer: `72` or `x = 72`, not `48+24` or `3^5`,
  which may be the question copied down. Words that announce it and units (`units`) are no part of it, of whatever
  script; a word that changes the value (`million`, `K`, `thirds`) is no unit, also behind a surd.
- Against an integer in a base (`12_8`) an answer has the same digits and the same base, or no base: the question names
  it. The same value in another base is no answer, nor is such an integer one against a plain number.
- Times of day, dates, amounts (`3 feet 4 inches`, `7 R 2`) and words are compared as such (`phrases`): 2:30 is not
  1:15, am is not pm, and where one side names no half of the day, the question names it.
- Against any other gold, Math-Verify decides on the extracted answer alone. Tuples are ordered, sets are not, and a set
  is no tuple; units and percent signs are ignored; decimals must agree to one in a million.
- The same text, up to spaces, is equal without further question.
"""

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

from mua_rl.rewards.completions import completion_text, required_column
from mua_rl.rewards.extract_math import MAX_ANSWER_CHARS, extract_answer
from mua_rl.rewards.latex import plain_latex
from mua_rl.rewards.math_quick import comparable, needs_algebra, quick_verdict
from mua_rl.rewards.worker_pool import REQUEST_SECONDS, Failure, WorkerPool, shared_pool

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

_LOST = (MathVerdict.TIMEOUT, MathVerdict.KILLED, MathVerdict.MEMORY)


class _LossMonitor:
    """Says so when more than one answer in a hundred got no verdict, at most once in `_WINDOW` answers."""

    _WINDOW = 1000

    def __init__(self) -> None:
        self._answers = self._lost = 0
        self._silent = False
        self._lock = threading.Lock()

    def count(self, answers: int, lost: int) -> None:
        with self._lock:
            self._answers += answers
            self._lost += lost
            if self._lost * 100 > self._answers and not self._silent:
                _logger.warning(
                    "%d of %d answers (%.1f %%) were too much for Math-Verify in %g s, twice, and score 0. If they "
                    "look harmless, the machine is busy: give the rewards fewer workers (MUA_RL_REWARD_WORKERS).",
                    self._lost,
                    self._answers,
                    100 * self._lost / self._answers,
                    REQUEST_SECONDS,
                )
                self._silent = True
            if self._answers >= self._WINDOW:
                self._answers = self._lost = 0
                self._silent = False


_losses = _LossMonitor()
_logger = logging.getLogger(__name__)


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
        compared = [(plain_latex(gold), comparable(gold, answer)) for gold, answer in unknown]
        for pair, verdict in zip(unknown, _ask_math_verify(compared, pool), strict=True):
            slow[pair] = verdict
            if verdict not in _LOST:  # which says something of the machine's load, perhaps, and nothing of the answer
                _cache.put(pair, verdict)
    lost = {pair for pair, verdict in slow.items() if verdict in _LOST}
    _losses.count(len(pairs), sum(pair in lost for pair in pairs) if lost else 0)
    return [verdict or slow[pair] for pair, verdict in zip(pairs, verdicts, strict=True)]  # type: ignore[misc]


def gold_faults(golds: Sequence[Any], *, pool: WorkerPool | None = None) -> list[str | None]:
    """What is wrong with each gold answer, or `None` for a good one: it can be read, and it equals itself.

    Call it on every row when a dataset is loaded (`mua_rl.envs` does): a gold that cannot be read would score every
    completion 0.
    """
    texts = [_gold_text(gold) for gold in golds]
    slow = list(dict.fromkeys(text for text in texts if text is not None and needs_algebra(text)))
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
    answer: Sequence[Any] | None = None,
    log_metric: Callable[[str, float], None] | None = None,
    **columns: Any,
) -> list[float | None]:
    r"""Score 1.0 for each completion whose final answer equals `answer`, else 0.0; `None` where the gold is unusable.

    A TRL reward function. Total in the completions: no text, length or type raises or scores above 0 by accident.

    Args:
        prompts: Not used.
        completions: Strings or conversations.
        answer: Gold answers, one per completion, or lists of several: the dataset's `answer` column, or, where it has
            none, its `solution`. A worked solution (GSM8K's, with `####`; MATH's, with `\\boxed`) holds its gold where
            a completion would.
        log_metric: TRL's logger; gets `math/timeout`, `math/error`, `math/no_answer` and `math/unreadable`, each the
            fraction of this batch.
        columns: Other columns, not used but for `solution`.

    Raises:
        UserError: There is no column of gold answers, or it has another length.
        GraderFault: Math-Verify does not start; it is never scored 0 silently.

    Example:
        >>> math_reward(completions=[r"So \boxed{\frac{2}{4}}.", "#### 7"], answer=["1/2", "72"])
        [1.0, 0.0]
    """
    golds = _golds(answer, columns, completions)
    verdicts = judge_completions(completions, golds)
    _warn_of_bad_golds(golds, verdicts)
    if log_metric is not None and verdicts:
        for name, counted in _METRICS.items():
            log_metric(name, sum(verdict in counted for verdict in verdicts) / len(verdicts))
    return _scores(verdicts)


def strict_math_reward(
    prompts: Sequence[Any] | None = None,
    completions: Sequence[Any] = (),
    answer: Sequence[Any] | None = None,
    **columns: Any,
) -> list[float | None]:
    """`math_reward` for the strict final-answer form only (`judge_completions`): the held-out check on a policy."""
    return _scores(judge_completions(completions, _golds(answer, columns, completions), strict=True))


def _golds(answer: Sequence[Any] | None, columns: dict[str, Any], completions: Sequence[Any]) -> Sequence[Any]:
    golds = columns.get("solution") if answer is None else answer
    return required_column("math_reward", "answer", golds, columns, completions)


_bad_golds_told: set[str] = set()


def _warn_of_bad_golds(golds: Sequence[Any], verdicts: Sequence[MathVerdict]) -> None:
    bad = {_shorten(gold) for gold, verdict in zip(golds, verdicts, strict=True) if verdict is MathVerdict.BAD_GOLD}
    if bad and bad.isdisjoint(_bad_golds_told):
        _logger.warning("a gold answer cannot be read, and its completions get no reward (None): %s", min(bad))
        _bad_golds_told.update(bad)


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
    if not isinstance(gold, str):
        return None
    if "####" in gold or "\\boxed" in gold:  # a worked solution
        extract = extract_answer(gold)
        gold = extract.text if extract else ""
    gold = gold.strip()
    return gold if 0 < len(gold) <= MAX_ANSWER_CHARS else None


def _quick_verdict(gold: str, answer: str) -> MathVerdict | None:
    """The verdict that needs no symbolic algebra, or `None`."""
    if not gold:
        return MathVerdict.BAD_GOLD
    if len(answer) > MAX_ANSWER_CHARS:
        return MathVerdict.UNREADABLE
    equal = quick_verdict(gold, answer)
    return equal if equal is None else MathVerdict.RIGHT if equal else MathVerdict.WRONG
