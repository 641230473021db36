"""What is told right from wrong without symbolic algebra: plain numbers, integers in a base, times, dates and words.

`mua_rl.rewards.math` has the conventions, and asks Math-Verify about the rest.
"""

import re
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeAlias

from mua_rl.rewards.latex import plain_latex
from mua_rl.rewards.numbers import NumberInBase, PlainNumber, parse_in_base, parse_number, same_number
from mua_rl.rewards.phrases import (
    HEDGE,
    TimeOfDay,
    parse_amounts,
    parse_date,
    parse_phrase,
    parse_time,
    same_time,
    without_label,
)
from mua_rl.rewards.units import changing_words

Reading: TypeAlias = PlainNumber | NumberInBase | TimeOfDay | tuple[Any, ...]


def _reading(gold: str) -> Reading | None:
    """What a gold is that needs no symbolic algebra, or `None`."""
    number = parse_number(gold)
    return number if number is not None and gold[-1].isdigit() else _reading_of_words(gold)


@lru_cache(maxsize=65536)
def _reading_of_words(gold: str) -> Reading | None:
    plain = plain_latex(gold)
    number = parse_number(gold)
    if number is not None:
        return parse_time(plain) or number  # `5 pm`
    return parse_in_base(gold) or parse_time(plain) or parse_amounts(plain) or parse_date(plain) or parse_phrase(plain)


def quick_verdict(gold: str, answer: str) -> bool | None:
    """Whether the answer equals the gold, where that needs no symbolic algebra, else `None`."""
    reading = _reading(gold)
    if isinstance(reading, PlainNumber):
        number = _stated_number(answer)
        return number is not None and same_number(reading, number)
    if isinstance(reading, NumberInBase):
        return _states(answer, reading)
    plain_gold, plain = plain_latex(gold), comparable(gold, answer)
    if _bare(plain_gold) == _bare(plain):
        return True
    time = parse_time(plain)
    if isinstance(reading, TimeOfDay) and (time or reading.certain):
        return time is not None and same_time(reading, time)
    if time is not None and time.certain:
        return False
    if isinstance(reading, tuple):
        last = plain.rpartition("=")[2]
        phrase = parse_phrase(plain)
        if reading in (parse_amounts(last), parse_date(last), phrase):
            return True
        if phrase is not None or not _PRODUCT.fullmatch(plain_gold):
            return False
    if "=" not in plain and _is_equation(plain_gold):  # to Math-Verify `0` is `x + y = 0`
        return False
    if changing_words(plain_gold) != changing_words(plain):
        return False
    ours, theirs = _brackets(plain_gold), _brackets(plain)
    only_kinds_differ = ours != theirs and ours.translate(_SETS_AS_TUPLES) == theirs.translate(_SETS_AS_TUPLES)
    return False if only_kinds_differ else None


def comparable(gold: str, answer: str) -> str:
    """The answer without what announces it, where the gold has no such thing."""
    return plain_latex(answer) if "=" in plain_latex(gold) else without_label(plain_latex(answer))


def needs_algebra(gold: str) -> bool:
    """Whether a gold is compared by Math-Verify, at least with some answers."""
    reading = _reading(gold)
    return reading is None or (isinstance(reading, TimeOfDay) and not reading.certain)


def _brackets(text: str) -> str:
    r"""The brackets and commas of an answer, sets' as `[]`: all that tells `\{1,2\}` from `(1,2)`, at any depth."""
    last = re.split(r"=|\\in(?![A-Za-z])", text)[-1]
    shown = "".join({"\\{": "[", "\\}": "]"}.get(mark, mark) for mark in re.findall(r"\\[{}]|[(),]", last))
    while (without := shown.replace("()", "").replace("[]", "")) != shown:
        shown = without
    return shown


def _is_equation(text: str) -> bool:
    """Whether a formula stands before the first `=`, and not the name of what follows it."""
    left, equals, _ = text.partition("=")
    return bool(equals) and re.search(r"\S\s*[-+]|\S\^[0-9]", _GROUP.sub("", left)) is not None


def _states(answer: str, gold: NumberInBase) -> bool:
    """Whether an answer states an integer in a base: `12_8`, `x = 12_8`, or without the base."""
    plain = plain_latex(answer)
    is_open = "=" in plain and _states_no_number(plain)
    found = None if is_open else parse_in_base(plain.rpartition("=")[2], gold.base)
    if found is not None:
        return found == gold
    number = _stated_number(answer)  # `1,101`
    return number is not None and gold.digits.isdecimal() and same_number(PlainNumber(Fraction(gold.digits)), number)


def _bare(text: str) -> str:
    return "".join(text.split()).strip("$.")


_PRODUCT = re.compile(r"[A-Za-z(),]+")  # which may be words to us: `xyz`
_SETS_AS_TUPLES = str.maketrans("[]", "()")
_GROUP = re.compile(r"\{[^{}]*\}|\([^()]*\)")
_BOUND = re.compile(  # or a choice: `x >= 5`, `x != 5` (where `5! = 120` states a number)
    r"[,;<>≠≤≥]|\\\\|[A-Za-z]\s*!="
    r"|\\(?:lor|vee|land|wedge|q?quad|pm|mp|not|ne|neq|[lg]t|[lg]eq?|[lg]eqq|[lg]eqslant)(?![A-Za-z])"
)


def _states_no_number(plain: str) -> bool:
    return _BOUND.search(plain) is not None or HEDGE.search(plain) is not None


_BRACKETS = (("\\{", "\\}"), ("(", ")"))


@lru_cache(maxsize=65536)
def _stated_number(answer: str) -> PlainNumber | None:
    r"""The number an answer states: the text itself, `x = 5`, `x = 2 + 3 = 5`, `5 \approx 5.0`, `\{5\}`, `(5)`."""
    number = parse_number(answer)
    if number is not None:
        return number
    text = without_label(plain_latex(answer)).replace("\\left", "").replace("\\right", "")
    if _states_no_number(text):
        return parse_number(text)  # a label was all that stood before it: `Answer: 1,000`
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
