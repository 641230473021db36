"""Files that are written whole or not at all."""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file in one step, in place of what was there; several processes may, and one of them has the last word.

    Raises:
        OSError: The file cannot be written; what was there still is.
    """
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise
