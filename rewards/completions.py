"""The text of a completion, whatever form the trainer or a user hands it in, and the columns beside it."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mua_rl.errors import UserError

_NUMBER = re.compile(r"(?:(?<!\d)-)?\d+(?:\.\d+)?")


def completion_text(completion: Any) -> str:
    """The policy's own words: a string, or the content of the last assistant message of a conversation.

    Total: `None`, an empty list, messages without content and anything unknown give the empty string, which no
    verifier rewards.

    Args:
        completion: A string, a message (`{"role": …, "content": …}`), or a list of messages. A content may itself be
            a list of parts with a `text`.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, dict):
        return _content_text(completion.get("content"))
    if isinstance(completion, (list, tuple)):
        for message in reversed(completion):
            if isinstance(message, dict) and message.get("role", "assistant") == "assistant":
                return _content_text(message.get("content"))
    return ""


_FROM_TRAINER = ("completion_ids", "trainer_state", "log_extra", "log_metric", "environments")


def required_column(
    reward: str, name: str, values: Sequence[Any] | None, columns: Mapping[str, Any], completions: Sequence[Any]
) -> Sequence[Any]:
    """The values of a column that a reward cannot do without.

    Raises:
        UserError: It is not there, or has not one value for each completion.
    """
    if values is None or len(values) != len(completions):
        others = ", ".join(sorted(set(columns) - set(_FROM_TRAINER))) or "none other"
        count = "no" if values is None else f"{len(values)} values of"
        raise UserError(
            f"{reward} got {count} `{name}` for {len(completions)} completions: name the data set's column so (it has: "
            f"{others})."
        )
    return values


def tagged_answer(text: str) -> str | None:
    """The inside of the last `<answer>…</answer>` after the last `</think>`, stripped; `None` without one."""
    scope = text.rpartition("</think>")[2]
    _, opened, rest = scope.rpartition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return inside.strip() if opened and closed else None


def last_number(text: str) -> str | None:
    """The last integer or decimal number of a text, as it is written there; `None` without one."""
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def _content_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        parts = (part.get("text") for part in content if isinstance(part, dict))
        return "".join(text for text in parts if isinstance(text, str))
    return ""
