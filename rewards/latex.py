r"""LaTeX that changes how an answer looks and never what it says, taken away before anything is compared.

`plain_latex` is for golds and answers alike. Fonts, sizes, colours, spacing and needless braces go; `\over` becomes
`\frac`, thin spaces between thousands become commas, and every command for upright words becomes `\text{…}`, which
holds words alone: a number in it (`\text{18 dollars}`) is written outside (`18 \text{dollars}`).
"""

import re
from functools import lru_cache

TEXT_COMMAND = re.compile(r"\\(?:text|mathrm)\{([^{}]*)\}")
"""An upright piece of `plain_latex`, its words in the first group; `\\mathrm` is left around single letters only."""

_CHARACTERS = str.maketrans(
    {"−": "-", "–": "-", "±": r"\pm ", "⁄": "/", "\u200b": ""} | dict.fromkeys("\u00a0\u2007\u2009\u202f", " ")
)
VULGAR_FRACTIONS = "½⅓⅔¼¾⅕⅛"
_FRACTIONS = str.maketrans(
    {
        vulgar: f"\\frac{{{over}}}{{{under}}}"
        for vulgar, over, under in zip(VULGAR_FRACTIONS, "1121311", "2334458", strict=True)
    }
)
_WORD_FONTS = re.compile(
    r"(?!\\mathrm\{[A-Za-z]\})"  # may be a unit, a constant or a variable
    r"\\(?:text(?:bf|it|rm|sf|tt|sl|sc|md|up|normal)?|emph|mathrm|mathsf|mathtt|mbox|hbox|rm|bf|it|sf|tt)\s*(?=\{)"
)
_OLD_WORD_FONT = re.compile(r"\{\s*\\rm(?![A-Za-z])([^{}]*)\}")
_NOTHING = re.compile(
    r"""
    \\(?:displaystyle|textstyle|scriptstyle|scriptscriptstyle|tiny|scriptsize|footnotesize|small|normalsize|large|Large
       |LARGE|huge|Huge|bf|it|rm|sf|tt|sl|sc|em|bfseries|itshape|rmfamily|boldmath|mathstrut|strut|limits|nolimits
       |boldsymbol|mathbf|mathit|mathnormal|bm|pmb|underline|ensuremath|boxed|fbox|num
       |thinspace|enspace|nobreakspace)(?![A-Za-z])
    | \\[bB]igg?[lrm]?(?![A-Za-z])
    | \\(?:color|colorbox|textcolor|fcolorbox\s*\{[^{}]*\})(?![A-Za-z])\s*(?:\[[^\]]*\])?\s*\{[^{}]*\}
    | \\(?:phantom|hphantom|vphantom|hspace\*?|vspace\*?|label|tag\*?)\s*\{[^{}]*\}
    | \\[hm]skip\s*-?[\d.]+\s*[a-z]{2}
    """,
    re.VERBOSE,
)
_FUNCTIONS = "arcsin|arccos|arctan|sin|cos|tan|cot|sec|csc|log|ln|exp"
_SPELLINGS = (
    (
        re.compile(r"\\(?:SI|qty)\s*\{([^{}]*)\}\s*\{([^{}]*)\}"),
        lambda m: f"{m[1]}\\text{{{m[2].replace(chr(92), '')}}}",
    ),
    (re.compile(rf"\\(?:text|operatorname)\s*\{{\s*({_FUNCTIONS})\s*\}}"), r"\\\1 "),
    (re.compile(r"\\lbrace(?![A-Za-z])"), r"\\{"),
    (re.compile(r"\\rbrace(?![A-Za-z])"), r"\\}"),
    (re.compile(r"\{:\}|\\colon(?![A-Za-z])"), ":"),
    (re.compile(r"(?<!\\)\\!\s*|(?<!\\)\{\}"), ""),
    (re.compile(r"(?<=[0-9])(?:,? ?\\[,;: ]|\{,\})(?=[0-9]{3}(?![0-9]))"), ","),
    (re.compile(r"(?<!\\)\\[,;:> ]|~|\s+"), " "),
    (re.compile(r"(?<=[}A-Za-z_^]) +\{"), "{"),
)
_UNIT_FRACTION = re.compile(
    r"\\[dt]?frac\{\s*\\(?:text|mathrm)\{([^{}\d]*)\}\s*\}\{\s*\\(?:text|mathrm)\{([^{}\d]*)\}\s*\}"
)
_OVER = re.compile(r"\\over(?![A-Za-z])")
# A group that stands by itself around one number or fraction: `{1}/{2}`, `-{\frac{1}{2}}`.
_LONE_GROUP = re.compile(
    r"(?<![\w}\]^\\])\{\s*(-?[0-9.,]+)\s*\}|(?<![A-Za-z}\]_^\\])(?<!frac[0-9])\{\s*(\\[dtc]?frac\{[^{}]*\}\{[^{}]*\})\s*\}"
)
_WORDS = re.compile(r"[^\W\d_][^\d$\\=<>+*^:;,]*")
_DELIMITERS = (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]"))
_ENDS = re.compile(r"^(?:[\s*`]|\\q?quad(?![A-Za-z]))+|(?:[\s*`.,;:]|\\q?quad(?![A-Za-z])|(?<!\\)\\\\?)+$")


def plain_characters(text: str) -> str:
    """`text` with the dashes and spaces of Unicode in the characters of a keyboard."""
    return text.translate(_CHARACTERS)


@lru_cache(maxsize=16384)
def plain_latex(text: str) -> str:
    """`text` without its markup. Total; takes time quadratic in the length at worst, so callers bound the length."""
    text = plain_characters(text).translate(_FRACTIONS)
    text = _OLD_WORD_FONT.sub(r"\\text{\1}", text)
    text = _NOTHING.sub(" ", _WORD_FONTS.sub(r"\\text", text))
    for pattern, spelling in _SPELLINGS:
        text = pattern.sub(spelling, text)
    text = _outside_text(text)
    text = _UNIT_FRACTION.sub(r"\\text{\1/\2}", text)
    text = _with_frac(text)
    previous = None
    while previous != text:
        previous = text
        text = _without_enclosure(_ENDS.sub("", _LONE_GROUP.sub(r"\1\2", text)))
    return text


def _closing(text: str, opening: int) -> int:
    """The place of the brace that closes the one at `opening`, or -1."""
    depth = 0
    for brace in re.compile(r"\\.|[{}]", re.DOTALL).finditer(text, opening):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.start()
    return -1


def _outside_text(text: str) -> str:
    r"""Each `\text{…}` with its numbers and formulas outside."""
    parts = []
    position = 0
    for command in re.finditer(r"\\text\{", text):
        end = _closing(text, command.end() - 1)
        if command.start() < position or end < 0:
            continue
        inside = text[command.end() : end]
        if re.search(r"\\[A-Za-z]|\{", inside):  # a formula in a word font
            shown = f"{{{_outside_text(inside)}}}"
        elif re.search(r"[\d$%°]", inside) or not any(char.isalpha() for char in inside):
            shown = " " + _WORDS.sub(lambda words: f"\\text{{{words[0]}}}", inside) + " "
        else:
            shown = text[command.start() : end + 1]
        parts += [text[position : command.start()], shown]
        position = end + 1
    return "".join([*parts, text[position:]])


def _with_frac(text: str) -> str:
    r"""`{a \over b}` as `\frac{a}{b}`."""
    for _ in range(8):
        over = _OVER.search(text)
        if over is None:
            break
        start, depth = 0, 0
        for brace in reversed(list(re.finditer(r"\\.|[{}]", text[: over.start()]))):
            depth += {"}": 1, "{": -1}.get(brace[0], 0)
            if depth < 0:
                start = brace.end()
                break
        end = _closing(text, start - 1) if start else len(text)
        if end < 0:
            break
        above, below = text[start : over.start()].strip(), text[over.end() : end].strip()
        text = f"{text[:start]}\\frac{{{above}}}{{{below}}}{text[end:]}"
    return text


def _without_enclosure(text: str) -> str:
    for left, right in _DELIMITERS:
        if text.startswith(left) and text.endswith(right) and len(text) >= len(left) + len(right):
            inner = text[len(left) : len(text) - len(right)]
            if left not in inner and right not in inner:
                return inner
    if text.startswith("{") and _closing(text, 0) == len(text) - 1:
        return text[1:-1]
    return text
