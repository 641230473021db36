"""Answers in words, and numbers that words or places make into something else: amounts, dates, times of day.

To Math-Verify they are products of letters, differences and quotients. Every reader takes a `plain_latex` and gives
`None` for what is not of its kind; the two sides of a comparison are equal when their readings are.
"""

import math
import re
from dataclasses import dataclass
from fractions import Fraction

from mua_rl.rewards.latex import TEXT_COMMAND

HEDGE = re.compile(
    r"\b(?:or|and|but|not|nor|either|neither|maybe|perhaps|possibly|alternatively|else|otherwise|then|also|if|unless"
    r"|except|where|while|instead|versus|vs)\b",
    re.IGNORECASE,
)
"""Words that join two answers, or take one back."""

_THOUSANDS = re.compile(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))")
_AMOUNT_WORDS = r"(?:\s*(?:[A-Za-z]{2,}|[rR])\b\.?)"
_AMOUNTS = re.compile(rf"[0-9]+(?:\.[0-9]+)?{_AMOUNT_WORDS}+(?:\s+[0-9]+(?:\.[0-9]+)?{_AMOUNT_WORDS}*)+")
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([^0-9]*)")
_DATE = re.compile(r"[0-9]{4}([-/])[0-9]{1,2}\1[0-9]{1,2}|[0-9]{1,2}([-/])[0-9]{1,2}\2[0-9]{4}")
_TIME = re.compile(
    r"(?P<hour>[0-9]{1,2})(?:\s*:\s*(?P<minute>[0-5][0-9])(?:\s*:\s*(?P<second>[0-5][0-9]))?)?"
    r"\s*(?:(?P<period>[ap])\.?\s*m\b\.?)?",
    re.IGNORECASE,
)
_PHRASE = re.compile(r"(?:[^\W_]|[\s.,;:'’\"()])*")
_HYPHEN = re.compile(r"(?<=[^\W\d_]{3})-(?=[^\W\d_]{3})")
_PRODUCT = re.compile(r"[0-9][^\W\d_]")
_TOKEN = re.compile(r"[^\W\d_]+|[0-9]+(?:\.[0-9]+)?")
_NO_PHRASE = frozenset({"or", "sqrt", "frac", "sin", "cos", "tan", "cot", "sec", "csc", "log", "exp", "infty"})
_MONTH = re.compile(
    r"(?:jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)"
)
_LABEL_IN_TEXT = re.compile(r"^\\text\{([^{}\d=:]{3,}):\s*")
_LABEL = re.compile(r"(?=[^:=]*[^\W\d_]{3})(?:\\text\{[^{}\d=]*\}|[^\W\d_]|[\s',.])+[:=]\s*(?=\S)")


@dataclass(frozen=True, slots=True)
class TimeOfDay:
    """A time as a clock shows it.

    Attributes:
        hour: 0 to 24, as written.
        minute: 0 to 59.
        second: 0 to 59.
        period: "a", "p", or "" where neither half of the day is named.
        certain: Whether it cannot be a ratio in lowest terms as well, which `3:20` can.
    """

    hour: int
    minute: int
    second: int
    period: str
    certain: bool


def words_of(text: str) -> str:
    r"""`text` with the inside of each `\text{…}` in its place, single spaces between, no commas in thousands."""
    return _THOUSANDS.sub("", " ".join(TEXT_COMMAND.sub(r" \1 ", text).split()))


def without_label(text: str) -> str:
    """`text` without the words that announce it (`Area = 18`, `Answer: 18`); a single letter is no word."""
    text = _LABEL_IN_TEXT.sub(r"\\text{\1}: \\text{", text).replace("\\text{}", "")
    label = _LABEL.match(text)
    return text if label is None or HEDGE.search(label[0]) else text[label.end() :]


def parse_amounts(text: str) -> tuple[tuple[Fraction, str], ...] | None:
    """The numbers of `3 feet 4 inches` or `7 R 2`, each with the words after it, sorted.

    Whose words are "and" and "or" alone is a list.
    """
    bare = words_of(text)
    words = {word.casefold() for word in re.findall(r"[A-Za-z]+", bare)}
    if "or" in words or words == {"and"} or not _AMOUNTS.fullmatch(bare):
        return None
    amounts = (
        (Fraction(number), " ".join(word for word in re.findall(r"[a-z]+", unit.casefold()) if word != "and"))
        for number, unit in _AMOUNT.findall(bare)
    )
    return tuple(sorted(amounts))


def parse_date(text: str) -> tuple[int, ...] | None:
    """The three numbers of `2024-01-05` or `3/4/2024`."""
    bare = "".join(words_of(text).split())
    return tuple(int(part) for part in re.split("[-/]", bare)) if _DATE.fullmatch(bare) else None


def parse_time(text: str) -> TimeOfDay | None:
    """The time of day that `10:30`, `10:30 p.m.` or `5 pm` is."""
    match = _TIME.fullmatch(words_of(text))
    if match is None or not (match["minute"] or match["period"]) or int(match["hour"]) > 24:
        return None
    hour, minute, second = (int(match[name] or 0) for name in ("hour", "minute", "second"))
    padded = match["hour"].startswith("0") or (match["minute"] or "0").startswith("0") or bool(match["second"])
    certain = bool(match["period"]) or padded or math.gcd(hour, minute) > 1
    return TimeOfDay(hour, minute, second, (match["period"] or "").lower(), certain)


def same_time(gold: TimeOfDay, answer: TimeOfDay) -> bool:
    """Whether two times are one; where a side names no half of the day, the question names it."""
    if bool(gold.period) == bool(answer.period):
        return _on_24_hours(gold) == _on_24_hours(answer)
    named, bare = (gold, answer) if gold.period else (answer, gold)
    return _on_24_hours(bare) in ((named.hour, named.minute, named.second), _on_24_hours(named))


def _on_24_hours(time: TimeOfDay) -> tuple[int, int, int]:
    hour = time.hour % 12 + 12 * (time.period == "p") if time.period and time.hour <= 12 else time.hour
    return hour, time.minute, time.second


def parse_phrase(text: str) -> tuple[str, ...] | None:
    """The words and numbers of an answer in words (`no solution`, `June 20`), in order; of a day of a month, sorted."""
    bare = _HYPHEN.sub(" ", words_of(text)).casefold()
    letters = "".join(bare.split())
    if letters.isalpha() and len(letters) >= 3:  # `B A C` too
        return (letters,)
    words = set(re.findall(r"[^\W\d_]+", bare))
    if not _PHRASE.fullmatch(bare) or not _NO_PHRASE.isdisjoint(words) or all(len(w) < 3 or w == "and" for w in words):
        return None
    tokens = tuple(_TOKEN.findall(bare))
    if any(_MONTH.fullmatch(word) for word in words):
        return tuple(sorted(token for token in tokens if token not in ("of", "the", "st", "nd", "rd", "th")))
    return None if _PRODUCT.search(bare) else tokens
