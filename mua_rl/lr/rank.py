"""A rank as people write it."""

from mua_rl.errors import UserError

FULL_WORDS = ("0", "full", "fft")
"""What people write in the place of a rank for full finetuning."""


def parse_rank(text: str | int) -> int | None:
    """A LoRA rank, or `None` for full finetuning ("0", "full", "fft").

    Raises:
        UserError: The text is neither.
    """
    word = str(text).strip().lower()
    if word in FULL_WORDS:
        return None
    try:
        rank = int(word)
    except ValueError:
        rank = -1
    if rank < 1:
        raise UserError(f"--rank takes a positive number, or 0 or full for full finetuning, not {text!r}.")
    return rank
