"""A rank as people write it."""

from mua_rl.errors import UserError


def parse_rank(text: str | int) -> int | None:
    """A LoRA rank, or `None` for full finetuning ("0", "full", "fft").

    Raises:
        UserError: The text is neither.
    """
    word = str(text).strip().lower()
    if word in ("0", "full", "fft"):
        return None
    try:
        rank = int(word)
    except ValueError:
        rank = -1
    if rank < 1:
        raise UserError(f"--rank takes a positive number, or 0 or full for full finetuning, not {text!r}.")
    return rank
