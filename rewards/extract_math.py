r"""The final answer in a completion: which of the things that a policy wrote counts.

The order, on which every math reward, evaluation and held-out check of this package agrees:

1. Scope. Only the text after the last `</think>` counts; in it, only the inside of the last `<answer>` when there is
   one. A closing tag may be missing (the end of the text closes it).
2. Marker. The last `\boxed{…}` (or `\fbox{…}`) in the scope; else the rest of the line after the last `####`; else
   all of the `<answer>`; else, without any marker, the last number in the scope: as a whole (`2 1/2`, `12 345`,
   `10:30 pm`), with what changes its value (`18 million`, `18k`).

What the chosen marker holds is the answer, readable or not: there is no falling back to another number in the text, so
a list of guesses, an unfinished box or prose in an `<answer>` fails.
"""

import re
from dataclasses import dataclass
from typing import Literal

from mua_rl.rewards.latex import VULGAR_FRACTIONS, plain_characters
from mua_rl.rewards.units import CURRENCY, is_scale, is_unit

MAX_ANSWER_CHARS = 500
"""A longer answer is not read: no gold is near it, and symbolic algebra on it is a way to stall the trainer."""

_TAIL_CHARS = 2000
_BOX_COMMANDS = ("\\boxed", "\\fbox")

Marker = Literal["boxed", "####", "answer", "number"]


@dataclass(frozen=True, slots=True)
class Extract:
    """An answer and where it was found.

    Attributes:
        text: The answer, stripped.
        marker: What announced it.
        final: Whether nothing but closing punctuation follows the marker, and no other marker of its kind precedes it
            in the completion: the strict form.
    """

    text: str
    marker: Marker
    final: bool


def extract_answer(text: str) -> Extract | None:
    """The final answer of `text` by the order in the module's docstring, or `None` when there is none.

    Total, linear in the length of `text`.
    """
    scope = text[text.rfind("</think>") + len("</think>") :] if "</think>" in text else text
    opened = scope.rfind("<answer>")
    after_scope, closed_last = "", False
    if opened >= 0:
        one_block = scope.find("<answer>") == opened
        scope, closing, after_scope = scope[opened + len("<answer>") :].partition("</answer>")
        closed_last = one_block and bool(closing) and not after_scope.strip()
    box = _last_box(scope)
    if box is not None:
        content, end = box
        alone = sum(scope.count(command) for command in _BOX_COMMANDS) == 1
        return _extract(content or "", "boxed", alone and _is_closing(scope[end:] + after_scope))
    mark = scope.rfind("####")
    if mark >= 0:
        line, _, rest = scope[mark + 4 :].partition("\n")
        alone = scope.count("####") == 1
        return _extract(line, "####", alone and _is_closing(rest + after_scope))
    if opened >= 0:
        return _extract(scope, "answer", closed_last)
    number = _last_number(scope[-_TAIL_CHARS:])
    return _extract(number, "number", False) if number else None


def _extract(text: str, marker: Marker, final: bool) -> Extract | None:
    text = _with_commas(text.strip())
    return Extract(text, marker, final) if text else None


def _last_box(text: str) -> tuple[str | None, int] | None:
    """Content and end of the last box; content `None` for a box that is never closed; `None` without any box."""
    boxed, fbox = _BOX_COMMANDS
    start = max(text.rfind(boxed), text.rfind(fbox))
    if start < 0:
        return None
    position = start + len(boxed if text.startswith(boxed, start) else fbox)
    opening = re.compile(r"\s*").match(text, position)
    position = opening.end() if opening else position
    if not text.startswith("{", position):  # `\boxed 5`: TeX takes the next token
        token = re.compile(r"[^\s$\\{}]+").match(text, position)
        return (token[0], token.end()) if token else (None, position)
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, position):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)  # `\{` and `\}` are literal braces, `\\}` is not one
        if depth == 0:
            return text[position + 1 : brace.start()], brace.end()
    return None, position


_CLOSING = re.compile(r"(?:[\s.!*$`}]|\\\]|\\\)|</answer>|<\|[a-z_]{1,20}\|>|</s>)*", re.IGNORECASE)


def _is_closing(rest: str) -> bool:
    """Whether nothing but closing punctuation follows; what is too long to be looked through counts as more."""
    return len(rest) <= _TAIL_CHARS and _CLOSING.fullmatch(rest) is not None


_NUMBER_IN_PROSE = re.compile(
    rf"""
    (?<![A-Za-z0-9_.]) -? (?:{CURRENCY}[ ]?)? -?
    (?:
        (?: [0-9]{{1,3}}(?:(?:,|\{{,\}}|\\,)[0-9]{{3}})+ | [0-9]+ )
        (?: \.[0-9]+ | [ ]?/[0-9]+(?![0-9/]) | [ ][0-9]+/[0-9]+(?![0-9/]) | (?::[0-9]+)+ | [ ]:[ ][0-9]+ )?
        (?: [eE][+-]?[0-9]{{1,3}}(?![A-Za-z0-9]) | [ ]?[{VULGAR_FRACTIONS}] )?
      | \.[0-9]+ (?: [eE][+-]?[0-9]{{1,3}}(?![A-Za-z0-9]) )?
      | [{VULGAR_FRACTIONS}]
    )
    (?![0-9]) (?P<attached>[^\W\d_]*) (?![\w{{]) (?:\\?%)?
    (?P<next>[ ](?:[ap]\.?m\b\.? | per\s?cent\b | [^\W\d_]+))?
    """,
    re.VERBOSE,
)
_ORDINAL = re.compile("st|nd|rd|th")
_BELONGS = re.compile(r"[ap]\.?m\.?|per\s?cent", re.IGNORECASE)
# A number that ends a list of guesses, bounds something, or is a piece of a formula is not the answer.
_NOT_BEFORE = re.compile(
    r"\d\s*(?:[,/+*×÷-]|\bor\b|\band\b)\s*(?:or|and)?\s*$"
    r"|(?:[{}_^&<>≤≥≠|]|!=|\\(?:geq?|leq?|[lg]t|neq?|sqrt|pm|mp|cdot|times|div))\s*$",
    re.IGNORECASE,
)
_NOT_AFTER = re.compile(r"\s*(?:[}^_/+&<>≤≥|]|!(?!\s|$)|\*(?!\*)|\\(?!text|mathrm|mbox|[%$)\],;:! \\]))")


def _last_number(text: str) -> str | None:
    last = None
    for number in _NUMBER_IN_PROSE.finditer(_with_commas(plain_characters(text))):
        last = last if _ORDINAL.fullmatch(number["attached"]) else number
    if last is None or (last["attached"] and not (is_unit(last["attached"]) or is_scale(last["attached"]))):
        return None
    text, word = last.string, (last["next"] or "").strip()
    end = last.end() if _BELONGS.fullmatch(word) or is_scale(word) else last.end() - len(last["next"] or "")
    if _NOT_AFTER.match(text, end) or _NOT_BEFORE.search(text[max(0, last.start() - 40) : last.start()]):
        return None
    return text[last.start() : end]


_SPACED_THOUSANDS = re.compile(
    r"(?<![\w.,}])(?<![0-9.,}][ ])[0-9]{1,3}(?:[ ~\u00a0\u2009\u202f][0-9]{3})+(?![0-9]|[ ][0-9])"
)


def _with_commas(text: str) -> str:
    """`12 345` as `12,345`: one number, of which its last three digits are not the answer."""
    if text.isascii() and " " not in text and "~" not in text:  # by far the commonest
        return text
    return _SPACED_THOUSANDS.sub(lambda number: re.sub(r"[^0-9]", ",", number[0]), text)
