r"""Plain numbers as exact rationals: the fast path of the math reward.

`parse_number` reads what GSM8K, and most of MATH, has for answers, by a regular expression and integer arithmetic: no
symbolic algebra, no `eval`, no floats. What it does not read is left to Math-Verify (`mua_rl.rewards.math`).

Conventions (tests/test_math_numbers.py has the table):

- ASCII digits. A comma groups thousands (`1,234,567`, `1{,}234`, `1\,234`) and is nothing else; a point is decimal.
- Fractions `3/4`, `\frac{3}{4}`, `\frac34`, mixed numbers `1 3/4`, `1\frac{3}{4}`; powers of ten `1.5e3`,
  `1.5 \times 10^{3}`; repeating decimals `0.1\overline{6}`, which are exact.
- Currency signs, units (`12 apples`, `5\text{ cm}^2`, `90^\circ`) and markup (`$…$`, `**…**`) are stripped. A word
  that changes the value (`million`, `thirds`, `squared`) is no unit: such text is not a plain number.
- `12_8`, `12_{8}`, `(12)_8`, `12 \text{ base } 8`: an integer in base 2 to 16 (`parse_in_base`), which is no plain one.
- `p%` equals `p%` and, against a number without the sign, both `p` and `p/100`: questions ask for either.
- Numbers are equal when they are equal as rationals. The one exception: a decimal of at least six significant digits
  equals the non-terminating fraction that it rounds (`0.333333` and `1/3`; not `0.33`).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

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
_CURRENCY = r"(?:\\?\$|[€£¥₹]|(?:USD|EUR|GBP)\b)"
_GROUPED = r"[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+"
_GAP = r"(?:\s|~|\\[ ,;:])*"
_NUMBER = re.compile(
    rf"""
    (?P<sign>[+-]?){_GAP} {_CURRENCY}? {_GAP} (?P<inner_sign>[+-]?)
    (?:
        (?:(?P<whole>{_GROUPED}){_GAP})??
        (?: \\[dtc]?frac (?: \{{\s*(?P<num1>[+-]?[0-9]+)\s*\}} | \s*(?P<num2>[0-9]) )
                         (?: \s*\{{\s*(?P<den1>[0-9]+)\s*\}} | (?P<den2>[0-9]) )
          | (?P<num3>{_GROUPED}) \s*/\s* (?P<den3>{_GROUPED}) )
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

# Units that are too short to be told from a product of variables by their length, but are written beside numbers.
_SHORT_UNITS = frozenset(
    {"cm", "mm", "km", "ft", "in", "yd", "mi", "kg", "mg", "lb", "oz", "mL", "ml", "hr", "am", "pm"}
)
_INNER_WORDS = _SHORT_UNITS | {"of", "a", "an", "in"}
# Words after a number that change its value, or offer a second one: none of them is a unit.
_NOT_UNITS = re.compile(
    r"hundred|thousand|lakh|crore|dozens?|score|gross|.*illions?|hal(?:f|ves)|thirds?|quarters?|fourths?|fifths?|"
    r"sixths?|sevenths?|eighths?|ninths?|tenths?|\w+ths|squared|cubed|factorial|choose|times|plus|minus|over|divided|"
    r"multiplied|mod|modulo|and|not|but|sqrt|frac|sin|cos|tan|cot|sec|csc|log|exp|infinity|infty|alpha|beta|theta|"
    r"or|to|nor|versus|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|twenty|thirty|forty|fifty|"
    r"sixty|seventy|eighty|ninety|zero|half|double|triple|base|more|less|than|per\s*cent|percent\w*|pct",
    re.IGNORECASE,
)
_PERCENT = re.compile(r"(?:\\?%|per\s?cent(?:age)?\b|pct\b)\.?", re.IGNORECASE)
_DEGREE = re.compile(r"(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|°|\\degree)\s*[CF]?\s*")
_TRAILING_CURRENCY = re.compile(_CURRENCY)
_THIN_SPACE = re.compile(r"(?<=[0-9]),? ?\\,(?=[0-9]{3}(?![0-9]))")
_NEGATIVE_SPACE = re.compile(r"\\!\s*")
_TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|textrm|mbox|textnormal|rm)\s*\{([^{}]*)\}")
_UNIT_WORD = re.compile(r"([A-Za-z]+)(\s*\^\s*(?:[23]|\{[23]\})|[²³])?")
_UNIT_JOINT = re.compile(r"[\s/.·\-~]*")


def _is_unit(suffix: str) -> bool:
    """Whether `suffix` is nothing but a unit: words of at least three letters, or known short units."""
    text, in_text_command = _TEXT_COMMAND.subn(r" \1 ", suffix)
    position = words = 0
    while True:
        joint = _UNIT_JOINT.match(text, position)
        position = joint.end() if joint else position
        if position == len(text):
            return True
        match = _UNIT_WORD.match(text, position)
        if match is None or words == 6 or _NOT_UNITS.fullmatch(match[1]):
            return False
        # A lone letter is a unit only where the writing says so; otherwise `5 m` is the product of 5 and m.
        said_so = in_text_command or match[2] in ("²", "³") or (words > 0 and joint is not None and "/" in joint[0])
        if len(match[1]) < 3 and not said_so and match[1] not in (_SHORT_UNITS if words == 0 else _INNER_WORDS):
            return False
        words += 1
        position = match.end()


def _strip_markup(text: str) -> str:
    text = text.strip().replace("−", "-").replace("{,}", ",").replace("\\displaystyle", "")
    text = _NEGATIVE_SPACE.sub("", text)
    text = _THIN_SPACE.sub(",", text)
    previous = None
    while previous != text:
        previous = text
        text = text.strip().strip("*`").rstrip(".,;:\\").strip()
        for left, right in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"), ("{", "}")):
            if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
                inner = text[len(left) : len(text) - len(right)]
                if left not in inner and right not in inner:
                    text = inner
    return text


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
    match = _NUMBER.fullmatch(_strip_markup(text))
    if match is None or (match["sign"] and match["inner_sign"]):
        return None
    value = _magnitude(match)
    if value is None:
        return None
    magnitude, last_place = value
    suffix = match["suffix"].strip()
    if _TRAILING_CURRENCY.fullmatch(suffix):
        suffix = ""
    percent = False
    if suffix:
        degree = _DEGREE.match(suffix)
        sign = _PERCENT.match(suffix)
        if degree:
            suffix = suffix[degree.end() :]
        elif sign:
            percent, suffix = True, suffix[sign.end() :].strip()
        else:
            text_percent = _TEXT_COMMAND.fullmatch(suffix)
            if text_percent and _PERCENT.fullmatch(text_percent[1].strip()):
                percent, suffix = True, ""
        if suffix and not _is_unit(suffix):
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
    bare = _strip_markup(_TEXT_COMMAND.sub(r" \1 ", text))
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


_AMOUNT_WORDS = r"(?:\s*(?:[A-Za-z]{2,}|[rR])\b\.?)"
_AMOUNTS = re.compile(rf"[0-9]+(?:\.[0-9]+)?{_AMOUNT_WORDS}+(?:\s+[0-9]+(?:\.[0-9]+)?{_AMOUNT_WORDS}*)+")
_AMOUNT = re.compile(r"([0-9]+(?:\.[0-9]+)?)([^0-9]*)")


def parse_amounts(text: str) -> list[tuple[Fraction, str]] | None:
    """The numbers of `3 feet 4 inches` or `7 R 2`, each with the words after it, sorted; `None` for anything else.

    Total. Whose words are "and" and "or" alone is a list.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    bare = re.sub(r"\\[ ,;:]|~", " ", _strip_markup(_TEXT_COMMAND.sub(r" \1 ", text)))
    words = {word.casefold() for word in re.findall(r"[A-Za-z]+", bare)}
    if "or" in words or words == {"and"} or not _AMOUNTS.fullmatch(" ".join(bare.split())):
        return None
    return sorted(
        (Fraction(number), " ".join(word for word in re.findall(r"[a-z]+", unit.casefold()) if word != "and"))
        for number, unit in _AMOUNT.findall(bare)
    )


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
