"""The fenced code blocks of a Markdown text, as models write them.

CommonMark's rules (https://spec.commonmark.org/0.31.2/#fenced-code-blocks), and what models write beside them: a fence
behind other text on its line, a fence at the end of the last line of code, one that is left open. Text is searched line
by line, in one pass.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

_PYTHON_LABELS: Final = frozenset({"python", "py", "ipython"})
_CODE_LABELS: Final = frozenset({"", "code", "text", "txt", "plaintext", "plain"})
_MARKDOWN_LABELS: Final = frozenset({"markdown", "md"})

# Quote marks, list markers or other text; the fence; the label and its attributes, in which no backtick may be.
# Possessive quantifiers keep all of these linear in the length of the line.
_OPENING: Final = re.compile(
    r"(?P<before>(?:[^`~]|~(?!~~)|`(?!``)[^`]*+`(?!``))*+)(?P<fence>`{3,}+|~{3,}+)(?P<info>[^`]*+)$"
)
_CONTAINER: Final = re.compile(r"[ \t]*+(?:(?:[-*+]|\d{1,9}[.)])[ \t]++|>[ \t]*+)*+")
_ATTRIBUTES: Final = r"""\{.*\}|(?:[\w-]++=(?:"[^"]*+"|'[^']*+'|\S++)[ \t]*+)++"""
_LABEL_ALONE: Final = re.compile(rf"[ \t]*+[\w+.#:/-]*+(?:[ \t]++\d[\d.]*+)?[ \t]*+(?:{_ATTRIBUTES})?[ \t]*+")
_QUOTE: Final = re.compile(r"[ \t]*+(?:>[ \t]?)+")
_WORDS: Final = re.compile(r"[a-z][a-z+#-]*")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        label: "python", "" (no label, or one that says no more than that it is code), or another label.
        code: Its lines, without the indentation of a fence in a list, and without quote marks.
    """

    label: str
    code: str


def fenced_blocks(text: str) -> list[Block]:
    """The blocks of `text` in their order; those inside of a Markdown block stand for it."""
    blocks = []
    for block in _blocks(text):
        inner = fenced_blocks(block.code) if block.label in _MARKDOWN_LABELS else []
        blocks += inner or [block]
    return blocks


def _blocks(text: str) -> Iterator[Block]:
    opening: re.Match[str] | None = None
    lines: list[str] = []
    for line in text.splitlines(keepends=True):
        if opening is None:
            opening, lines = _opening(line), []
            continue
        last = _closing(line, opening)
        if last is None:
            lines.append(line)
            continue
        yield _block(opening, [*lines, last] if last else lines)
        # A fence with a label opens a block, also where the one before it was left open.
        opening, lines = _opening(line) if not last and _has_label(line) else None, []
    if opening is not None:
        yield _block(opening, lines)


def _opening(line: str) -> re.Match[str] | None:
    match = _OPENING.match(line.rstrip("\r\n"))
    if match is None or _CONTAINER.fullmatch(match["before"]):
        return match
    # Behind text, a fence could as well be a part of the text: it must have nothing behind it but a label.
    return match if match["fence"][0] == "`" and _LABEL_ALONE.fullmatch(match["info"]) else None


def _closing(line: str, opening: re.Match[str]) -> str | None:
    """What stands before the fence on a line that closes the block; `None` of a line that does not."""
    fence, column = opening["fence"], len(opening["before"])
    if _QUOTE.match(opening["before"]):
        line, column = _unquoted(line), 0
    text = line.strip()
    if text.startswith(fence):
        # Deeper in the code than its own indentation, a fence is a part of it: of a docstring, for example.
        return "" if len(line) - len(line.lstrip()) <= column + 3 else None
    if fence[0] == "`" and text.endswith(fence) and text.count(fence) == 1 and not text.startswith("#"):
        return line.rstrip()[: -len(fence)].rstrip("`") + "\n"
    return None


def _has_label(line: str) -> bool:
    match = _opening(line)
    return match is not None and bool(_LABEL_ALONE.fullmatch(match["info"])) and bool(match["info"].strip())


def _block(opening: re.Match[str], lines: list[str]) -> Block:
    before = opening["before"]
    if _QUOTE.match(before):
        before, lines = _unquoted(before), [_unquoted(line) for line in lines]
    label = _label(opening["info"])
    first = next((line for line in lines if line.strip()), "")
    if label == "" and _label(first) == "python" and _LABEL_ALONE.fullmatch(first.strip()):
        label, lines = "python", lines[lines.index(first) + 1 :]  # the label on a line of its own
        first = next((line for line in lines if line.strip()), "")
    margin = min(len(before) if _CONTAINER.fullmatch(before) else 0, _indentation(first))
    return Block(label, "".join(line[min(margin, _indentation(line)) :] for line in lines))


def _label(info: str) -> str:
    """The language that the words behind a fence name: `python title="x.py"`, `{.python .numberLines}`, `Python 3`."""
    words = _WORDS.findall(info.lower())
    if words and words[0] in ("language", "lang"):
        words = words[1:]
    words = [word.removeprefix("language-").removeprefix("lang-") for word in words]
    named = words if info.lstrip().startswith("{") else words[:1]
    if _PYTHON_LABELS.intersection(named):
        return "python"
    first = words[0] if words else ""
    return "" if first in _CODE_LABELS else first


def _unquoted(line: str) -> str:
    match = _QUOTE.match(line)
    return line[match.end() :] if match else line


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))
