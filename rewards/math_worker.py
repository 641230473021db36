r"""The process in which Math-Verify runs: replies to a (gold, answer) pair of texts with a verdict.

Nothing here evaluates text as Python: LaTeX goes to Math-Verify's grammar-based parser only, because its parser for
plain expressions ends in SymPy's `parse_expr`, which is `eval`.
"""

import re
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from mua_rl.rewards.latex import plain_latex
from mua_rl.rewards.units import is_unit
from mua_rl.rewards.worker_loop import serve

_MAX_NESTING = 30  # the parser backtracks: its time grows without bound in the nesting
_RELATIVE_TOLERANCE = 1e-6
_SPELLINGS = (
    (r"\\varnothing(?![A-Za-z])", r"\\emptyset"),
    (r"(?:\\left\s*)?\\langle(?![A-Za-z])", "("),
    (r"(?:\\right\s*)?\\rangle(?![A-Za-z])", ")"),
    (r"√\s*(?:([0-9]+|[A-Za-z])|\(([^()]*)\))", r"\\sqrt{\1\2}"),
    ("²", "^{2}"),
    ("³", "^{3}"),
    (r"(?<=[0-9}])\s*\\mathrm\{[mgshLN]\}$", ""),  # a unit
)
"""What Math-Verify 0.9 does not read, in words that it does."""
_PRIMES = re.compile(r"(?<=[A-Za-z])(?:'+|\^\s*(?:\{\s*(?:\\prime\s*)+\}|\\prime(?![A-Za-z])))")


_COUNTER = re.compile(r"(?<=[0-9})])\s*[^\x00-\x7f]+$")  # 元
_PLUS_MINUS, _MINUS_PLUS = re.compile(r"\\pm(?![A-Za-z])"), re.compile(r"\\mp(?![A-Za-z])")
_WARM_UP = (
    (r"2\sqrt{3}", r"\sqrt{12}"),
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"\frac{1}{x}+\sin x", r"\frac{1+x\sin x}{x+1}"),
    (r"\frac{\pi}{3}", r"\frac{1+\sqrt{5}}{2}"),
    (r"\{1,\sqrt{2}\}", r"\{1,\sqrt{3}\}"),
    (r"(0,\sqrt{2}]\cup(3,4)", r"(0,\sqrt{2})"),
    (r"x>\sqrt{2}", r"x<\sqrt{2}"),
    (r"x+2y=3", r"2y=3-x"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}1\\3\end{pmatrix}"),
)
"""Comparisons that load what SymPy loads at first use: seconds on a busy machine, which are no request's own."""


def clean_latex(text: str) -> str | None:
    """`text` as the inside of one box, or `None` for text that cannot be that.

    Delimiters, percent signs and closing punctuation go; a newline is a space. Digits of other scripts are refused:
    Python reads them as digits, LaTeX does not. Unbalanced braces are refused: they would end the box early; so is
    deep nesting.
    """
    if any(unicodedata.category(char) in ("Nd", "Cs") and not char.isascii() for char in text):
        return None
    text = re.sub(r"\$|\\[()\[\]]|\\?%", " ", plain_latex(text))
    for ours, known in _SPELLINGS:
        text = re.sub(ours, known, text)
    counter = _COUNTER.search(text)
    if counter and is_unit(counter[0]):
        text = text[: counter.start()]
    # Math-Verify leaves primes out, so that `y' = y` were `y = y`; subscripts it keeps.
    text = _PRIMES.sub(lambda found: "_{" + "prime" * len(re.findall("prime|'", found[0])) + "}", text)
    text = re.sub(r"\\mathrm\{([A-Za-z])\}", r"\1", text)  # Math-Verify 0.9 loses the rest of the text after it
    text = " ".join(text.split()).rstrip(".,;: ")
    depth = 0
    for brace in re.findall(r"\\.|[{}]", text):
        depth += {"{": 1, "}": -1}.get(brace, 0)
        if depth < 0 or depth > _MAX_NESTING:
            return None
    return text if text and depth == 0 and text.count("(") <= _MAX_NESTING else None


def far_apart(gold: Any, answer: Any) -> bool:
    """Whether two numeric expressions differ by more than one in a million of the larger.

    Math-Verify compares floats rounded at six decimals and calls a difference below 1e-15 zero, so tiny values are
    all equal to it (Math-Verify issue 14); this puts a relative bound beside its absolute one.
    """
    from sympy import Expr, MatrixBase, Tuple

    if isinstance(gold, Tuple) and isinstance(answer, Tuple) and len(gold) == len(answer):
        return any(far_apart(g, a) for g, a in zip(gold, answer, strict=True))
    if isinstance(gold, MatrixBase) and isinstance(answer, MatrixBase) and gold.shape == answer.shape:
        return any(far_apart(g, a) for g, a in zip(gold.flat(), answer.flat(), strict=True))
    if not (isinstance(gold, Expr) and isinstance(answer, Expr)) or gold.free_symbols or answer.free_symbols:
        return False
    try:
        gold_value, answer_value = complex(gold.evalf()), complex(answer.evalf())
    except (TypeError, ValueError, OverflowError):  # an infinity, or a function without a value: not numeric
        return False
    return abs(gold_value - answer_value) > _RELATIVE_TOLERANCE * max(abs(gold_value), abs(answer_value))


def load() -> Callable[[tuple[str, str]], str]:
    """Import Math-Verify; the returned function gives a pair of texts its verdict's name."""
    import logging

    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, FiniteSet, MatrixBase

    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def parsed(text: str) -> tuple[Any, ...]:
        inside = clean_latex(text)
        if inside is None:
            return ()
        return read(inside) or both_signs(inside)

    def both_signs(inside: str) -> tuple[Any, ...]:
        """The set of values of a formula with a double sign where Math-Verify reads none: in a fraction, say."""
        if not (_PLUS_MINUS.search(inside) or _MINUS_PLUS.search(inside)):
            return ()
        values = [read(_PLUS_MINUS.sub(sign, _MINUS_PLUS.sub(other, inside))) for sign, other in ("+-", "-+")]
        if not all(values):
            return ()
        sets = [value[0] if isinstance(value[0], FiniteSet) else FiniteSet(value[0]) for value in values]
        return (sets[0] | sets[1],)

    def read(inside: str) -> tuple[Any, ...]:
        # First match only: the whole box, or nothing. By default a box that cannot be read gives way to other text.
        found = parse(
            f"\\boxed{{{inside}}}", config, "no_fallback", extraction_mode="first_match", parsing_timeout=None
        )
        return tuple(expression for expression in found if isinstance(expression, (Basic, MatrixBase)))

    def equal(gold: tuple[Any, ...], answer: tuple[Any, ...]) -> bool:
        # Gold first: verify is not symmetric. Its own timeouts need signals; the pool's clock is ours.
        if not verify(list(gold), list(answer), timeout_seconds=None):
            return False
        return not far_apart(gold[0], answer[0])

    @lru_cache(maxsize=1024)
    def parsed_gold(text: str) -> tuple[Any, ...]:
        gold = parsed(text)
        return gold if gold and equal(gold, gold) else ()

    def judge(pair: tuple[str, str]) -> str:
        gold = parsed_gold(pair[0])
        if not gold:
            return "bad_gold"
        answer = parsed(pair[1])
        if not answer:
            return "unreadable"
        return "right" if equal(gold, answer) else "wrong"

    for pair in _WARM_UP:
        judge(pair)
    return judge


if __name__ == "__main__":
    serve(load)
