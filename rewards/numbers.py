r"""Plain numbers as exact rationals: the fast path of the math reward.

`parse_number` reads what GSM8K, and most of MATH, has for answers, by a regular expression and integer arithmetic: no
symbolic algebra, no `eval`, no floats. What it does not read is left to Math-Verify (`mua_rl.rewards.math`).

Conventions (tests/test_math_numbers.py has the table):

- ASCII digits. A comma groups thousands (`1,234,567`, `1{,}234`, `1\,234`) and is nothing else; a point is decimal.
- Fractions `3/4`, `\frac{3}{4}`, `\frac34`, `{3 \over 4}`, mixed numbers `1 3/4`, `1\frac{3}{4}`; powers of ten
  `1.5e3`, `1.5 \times 10^{3}`; repeating decimals `0.1\overline{6}`, which are exact.
- Currencies, units (`12 apples`, `18元`, `5\text{ cm}^2`, `90^\circ`) and markup (`$…$`, `**…**`, whatever
  `mua_rl.rewards.latex` takes away) are stripped. A word that changes the value (`million`, `K`, `thirds`, `squared`)
  is no unit: such text is not a plain number.
- `12_8`, `12_{8}`, `(12)_8`, `12 \text{ base } 8`: an integer in base 2 to 16 (`parse_in_base`), which is no plain one.
- `p%` equals `p%` and, against a number without the sign, both `p` and `p/100`: questions ask for either.
- Numbers are equal when they are equal as rationals. The one exception: a decimal of at least six significant digits
  equals the non-terminating fraction that it rounds (`0.333333` and `1/3`; not `0.33`).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from mua_rl.rewards.latex import TEXT_COMMAND, plain_latex
from mua_rl.rewards.units import CURRENCY, is_unit

MAX_NUMBER_CHARS = 500
"""Longer text is not a plain number: keeps integer parsing linear in practice."""

_ROUNDED_DIGITS = 6


@dataclass(frozen=True, slots=True)
class PlainNumber:
    """A number as written.

    Attributes:
        value: Exact value, the percent sign ignored.
        percent: Whether a percent sign or word follows.
        last_place: For a decimal of at least six significant digits, the value of one unit in its last place;
            otherwise 0.
    """

    value: Fraction
    percent: bool = False
    last_place: Fraction = Fraction(0)


@dataclass(frozen=True, slots=True)
class NumberInBase:
    """An integer as it is written in another base than the ordinary one, or in ten where that is said.

    Attributes:
        digits: With a minus where there is one, capital letters, and no zeros in front.
        base: 2 to 16.
    """

    digits: str
    base: int


def same_number(left: PlainNumber, right: PlainNumber) -> bool:
    """Whether two plain numbers are equal by the conventions above. Symmetric."""
    if left.percent == right.percent:
        return _equal(left, right)
    percentage, number = (left, right) if left.percent else (right, left)
    as_share = PlainNumber(percentage.value / 100, last_place=percentage.last_place / 100)
    return _equal(percentage, number) or _equal(as_share, number)


def _equal(left: PlainNumber, right: PlainNumber) -> bool:
    if left.value == right.value:
        return True
    return _rounds(left, right.value) or _rounds(right, left.value)


def _rounds(decimal: PlainNumber, exact: Fraction) -> bool:
    if not decimal.last_place or _terminates(exact):
        return False
    return abs(decimal.value - exact) * 2 <= decimal.last_place


def _terminates(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


_SIMPLE = re.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")
_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+"
_GAP = r"\s*"
_NUMBER = re.compile(
    rf"""
    (?P<sign>[+-]?){_GAP} {CURRENCY}? {_GAP} (?P<inner_sign>[+-]?)
    (?:
        (?:(?P<whole>{_GROUPED}){_GAP})??
        (?: \\[dtc]?frac (?: \{{\s*(?P<num1>[+-]?[0-9]+)\s*\}} | \s*(?P<num2>[0-9]) )
                         (?: \s*\{{\s*(?P<den1>[+-]?[0-9]+)\s*\}} | (?P<den2>[0-9]) )
          | (?P<num3>{_GROUPED}) \s*/\s* (?P<den3>-?(?:{_GROUPED})) )
    |   10\s*\^\s*(?:\{{\s*(?P<power1>[+-]?[0-9]{{1,3}})\s*\}}|(?P<power2>[0-9]))
    |   (?P<integer>{_GROUPED})?
        (?:\.(?P<decimals>[0-9]*)
            (?: \\(?:overline|bar) \s* (?: \{{(?P<repeated1>[0-9]+)\}} | (?P<repeated2>[0-9]) ) )? )?
        (?: [eE](?P<exponent1>[+-]?[0-9]{{1,3}})
          | \s*(?:\\times|\\cdot|\*|×)\s*10\s*\^\s*
            (?: \{{\s*(?P<exponent2>[+-]?[0-9]{{1,3}})\s*\}} | (?P<exponent3>[0-9]) ) )?
    )
    {_GAP} (?P<suffix>.*)
    """,
    re.VERBOSE | re.DOTALL,
)

_PERCENT = re.compile(r"(?:\\?%|per\s?cent(?:age)?\b|pct\b)\.?", re.IGNORECASE)
_DEGREE = re.compile(r"(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°|º|˚|\\degree|[℃℉])\s*[CF]?\s*")
_CURRENCY = re.compile(CURRENCY)


def _int(digits: str) -> int:
    return int(digits.replace(",", ""))


@lru_cache(maxsize=65536)
def parse_number(text: str) -> PlainNumber | None:
    """The plain number that `text` is as a whole, or `None` when it is anything else.

    Total: never raises, and takes time linear in `MAX_NUMBER_CHARS`.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    if _SIMPLE.fullmatch(text):  # the commonest answers by far: worth a way around the grammar
        whole, _, decimals = text.replace(",", "").partition(".")
        if not decimals:
            return PlainNumber(Fraction(int(whole)))
        return PlainNumber(Fraction(int(whole + decimals), 10 ** len(decimals)), False, _last_place(whole, decimals))
    match = _NUMBER.fullmatch(plain_latex(text))
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    value = _magnitude(match)
    if value is None:
        return None
    magnitude, last_place = value
    suffix = match["suffix"].strip()
    currency = _CURRENCY.match(suffix)
    suffix = suffix[currency.end() :].strip() if currency else suffix
    percent = False
    if suffix:
        degree = _DEGREE.match(suffix)
        sign = _PERCENT.match(suffix)
        if degree:
            suffix = suffix[degree.end() :]
        elif sign:
            percent, suffix = True, suffix[sign.end() :].strip()
        else:
            text_percent = TEXT_COMMAND.fullmatch(suffix)
            if text_percent and _PERCENT.fullmatch(text_percent[1].strip()):
                percent, suffix = True, ""
        if suffix and not is_unit(suffix):
            return None
    negative = "-" in (match["sign"], match["inner_sign"])
    return PlainNumber(-magnitude if negative else magnitude, percent, last_place)


_BASE_MARK = re.compile(r"_?[\s{(]*base|_")
_BASES = frozenset(map(str, range(2, 17)))
_IN_BASE = re.compile(r"[+-]?(?=.*[0-9]|[A-F]{2})(?:[0-9A-F]+|[0-9a-f]+)")  # `A_{12}` is a term of a sequence


@lru_cache(maxsize=65536)
def parse_in_base(text: str, base: int | None = None) -> NumberInBase | None:
    """The integer in a base that `text` is as a whole, or `None` when it is anything else. Total.

    Args:
        text: What may be one.
        base: That of a text which names none; `None`: such a text is no number in a base.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    bare = TEXT_COMMAND.sub(r" \1 ", plain_latex(text)).strip()
    digits, *bases = (part.strip(" {}()\\") for part in _BASE_MARK.split(bare))
    named = bases[0] if bases else str(base)
    if len(bases) > 1 or named not in _BASES or not _IN_BASE.fullmatch(digits):
        return None
    try:
        value = int(digits, int(named))
    except ValueError:  # a digit that the base does not have
        return None
    shown = digits.lstrip("+-0").upper() or "0"
    return NumberInBase(f"-{shown}" if value < 0 else shown, int(named))


def _last_place(whole: str, decimals: str) -> Fraction:
    """One unit in the last place of a decimal that is long enough to stand for a fraction, otherwise 0."""
    significant = (whole + decimals).lstrip("-0")
    return Fraction(1, 10 ** len(decimals)) if decimals and len(significant) >= _ROUNDED_DIGITS else Fraction(0)


def _magnitude(match: re.Match[str]) -> tuple[Fraction, Fraction] | None:
    """Value without sign, and the unit in the last place of a long decimal; `None` when the match holds no number."""
    numerator = match["num1"] or match["num2"] or match["num3"]
    if numerator is not None:
        denominator = _int(match["den1"] or match["den2"] or match["den3"])
        if denominator == 0:
            return None
        fraction = Fraction(_int(numerator), denominator)
        if match["whole"] is None:
            return fraction, Fraction(0)
        # `1 3/4` is a mixed number; `2 \frac{7}{3}` is not one, and may be meant as a product.
        return (_int(match["whole"]) + fraction, Fraction(0)) if 0 <= fraction < 1 else None
    power = match["power1"] or match["power2"]
    if power is not None:
        return Fraction(10) ** int(power), Fraction(0)
    integer, decimals, repeated = match["integer"], match["decimals"], match["repeated1"] or match["repeated2"]
    if integer is None and not decimals and not repeated:
        return None
    exponent = int(match["exponent1"] or match["exponent2"] or match["exponent3"] or 0)
    digits = (integer or "").replace(",", "") + (decimals or "")
    scale = Fraction(10) ** exponent
    value = Fraction(int(digits or 0), 10 ** len(decimals or ""))
    if repeated:
        return (value + Fraction(int(repeated), (10 ** len(repeated) - 1) * 10 ** len(decimals))) * scale, Fraction(0)
    return value * scale, _last_place(integer or "", decimals or "") * scale
