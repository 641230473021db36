r"""The process in which Math-Verify runs: reads (gold, answer) pairs on stdin, writes a verdict for each on stdout.

It is run as a file by `mua_rl.rewards.math_pool`, never imported by the trainer, and imports nothing of this package:
symbolic algebra on a policy's output can take for ever, or all memory, or crash the interpreter. Here it takes down
only a process that the pool kills and replaces. Three things bound its life, each without the help of the other two:
the pool's SIGKILL; a kernel timer with the default action, which a library stuck in C cannot swallow; and the end of
stdin or a changed parent, which say that the trainer is gone.

Nothing here evaluates text as Python: LaTeX goes to Math-Verify's grammar-based parser only, because its parser for
plain expressions ends in SymPy's `parse_expr`, which is `eval`.
"""

import json
import os
import re
import resource
import select
import signal
import sys
import unicodedata
from functools import lru_cache
from typing import Any

_PARENT_POLL_SECONDS = 2.0
_MAX_NESTING = 30  # the parser backtracks: its time grows without bound in the nesting
_RELATIVE_TOLERANCE = 1e-6


def clean_latex(text: str) -> str | None:
    """`text` as the inside of one box, or `None` for text that cannot be that.

    Delimiters, percent signs and closing punctuation go; a newline is a space. Digits of other scripts are refused:
    Python reads them as digits, LaTeX does not. Unbalanced braces are refused: they would end the box early; so is
    deep nesting.
    """
    if any(unicodedata.category(char) in ("Nd", "Cs") and not char.isascii() for char in text):
        return None
    text = re.sub(r"\$|\\[()\[\]]|\\?%|\\displaystyle|\\boxed|\\fbox", " ", text.replace("−", "-"))
    text = re.sub(r"\\mathrm\s*\{([A-Za-z])\}", r"\1", text)  # Math-Verify 0.9 loses the rest of the text after it
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


def _load() -> Any:
    """Import Math-Verify; returns `judge(gold, answer) -> verdict name`."""
    import logging

    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Basic, MatrixBase

    config = [LatexExtractionConfig(boxed_match_priority=0, try_extract_without_anchor=False)]

    def parsed(text: str) -> tuple[Any, ...]:
        inside = clean_latex(text)
        if inside is None:
            return ()
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

    def judge(gold_text: str, answer_text: str) -> str:
        gold = parsed_gold(gold_text)
        if not gold:
            return "bad_gold"
        answer = parsed(answer_text)
        if not answer:
            return "unreadable"
        return "right" if equal(gold, answer) else "wrong"

    return judge


def main(seconds: float, memory_bytes: int) -> None:
    """Serve pairs until stdin ends. `seconds` is the pool's limit for one pair; the own timer is one second longer."""
    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # whatever a library prints is no reply
    os.dup2(null, 2)
    os.nice(5)  # the trainer goes first
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the trainer's to handle
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    parent = os.getppid()
    judge = _load()
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    def reply(verdict: str) -> None:
        replies.write(json.dumps(verdict) + "\n")
        replies.flush()

    reply("ready")
    pending = b""
    while True:
        while b"\n" not in pending:
            readable, _, _ = select.select([0], [], [], _PARENT_POLL_SECONDS)
            if os.getppid() != parent:
                return
            if readable:
                chunk = os.read(0, 65536)  # unbuffered, so that select tells the truth
                if not chunk:
                    return
                pending += chunk
        line, _, pending = pending.partition(b"\n")
        gold, answer = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds + 1.0)
        try:
            verdict = judge(gold, answer)
        except MemoryError:
            verdict = "memory"
        except Exception:  # RecursionError, or anything that a parser raises on nonsense
            verdict = "unreadable"
        signal.setitimer(signal.ITIMER_REAL, 0)
        reply(verdict)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]))
