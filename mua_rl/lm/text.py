"""Prompts as the token ids that a policy is asked, and its token ids as the text that rewards get."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from mua_rl.errors import UserError, one_line

_OPENING_TAGS = re.compile(r"(<)(\w+>)|(\[)(\w+\])|(<\|)begin(_of_\w+\|>)")
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def is_conversational(tokenizer: Any) -> bool:
    """Whether the policy wants prompts as chat messages."""
    return tokenizer.chat_template is not None


def begins_answer(prompt: Any) -> bool:
    """Whether a prompt's last message is the beginning of the answer, which the policy is to go on with."""
    return not isinstance(prompt, str) and bool(prompt) and prompt[-1]["role"] == "assistant"


def prompt_ids(tokenizer: Any, prompts: Sequence, **options: Any) -> list[list[int]]:
    """Token ids of prompts (strings, or lists of messages) as a policy is asked them.

    Args:
        options: Of the chat template.

    Raises:
        UserError: The chat template refuses a prompt.
    """
    if isinstance(prompts[0], str):
        return tokenizer(list(prompts))["input_ids"]
    ids: dict[int, list[int]] = {}
    for begun in (False, True):
        numbers = [i for i, prompt in enumerate(prompts) if begins_answer(prompt) == begun]
        if not numbers:
            continue
        # An answer that has begun is gone on with; of the others, the template writes what comes before an answer.
        turn = {"continue_final_message" if begun else "add_generation_prompt": True}
        try:
            rendered = tokenizer.apply_chat_template([prompts[i] for i in numbers], return_dict=True, **turn, **options)
        except Exception as error:  # a template is a program of its own, and may raise anything
            roles = ", ".join(message["role"] for message in prompts[numbers[0]])
            raise UserError(
                f"the model's chat template refuses prompts such as the first one ({roles}): {one_line(error)}. Give "
                "the rows the roles that it takes (a system's text can stand in the user's message), or the tokenizer "
                "another template (--tokenizer_name)."
            ) from error
        ids |= dict(zip(numbers, rendered["input_ids"], strict=True))
    return [ids[i] for i in range(len(prompts))]


def check_template(tokenizer: Any, prompts: Iterable[Any], **options: Any) -> None:
    """Refuse a chat template that refuses the prompts, by one prompt of each sequence of roles.

    Raises:
        UserError: It does.
    """
    chats = (prompt for prompt in prompts if not isinstance(prompt, str))
    kinds = {tuple(message["role"] for message in prompt): prompt for prompt in chats}
    for prompt in kinds.values():
        prompt_ids(tokenizer, [prompt], **options)


def completion_texts(tokenizer: PreTrainedTokenizerBase, completions: Any) -> list[str]:
    """The text of completions without special tokens, but with tags: a model may have `<think>` as one of its tokens.

    Tags are special tokens that come in pairs (`<x>` and `</x>`, `[x]` and `[/x]`, `<|begin_of_x|>` and
    `<|end_of_x|>`), neither of which begins, ends or fills up a text.

    Args:
        completions: `(R, t)` token ids, or a list of R lists.
    """
    special = {str(token): number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    named = {getattr(tokenizer, name, None) for name in _NAMED}
    tags = {tag for opening in special for tag in _pair(opening) if {*_pair(opening)} <= special.keys() - named}
    dropped = {*tokenizer.all_special_ids, *special.values()} - {special[tag] for tag in tags}
    rows = [[number for number in map(int, row) if number not in dropped] for row in completions]
    return [str(tokenizer.decode(row)) for row in rows]


def _pair(opening: str) -> tuple[str, ...]:
    match = _OPENING_TAGS.fullmatch(opening)
    if match is None:
        return ()
    start, name = (part for part in match.groups() if part is not None)
    return opening, f"{start}end{name}" if start == "<|" else f"{start}/{name}"
