"""Pickles of stable-baselines3, also those from the days of Gym, whose spaces Gymnasium has under its own name.

A pickle runs code of its own: read only those whose origin you trust.
"""

import pickle
from typing import Any, BinaryIO


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        package, dot, rest = module.partition(".")
        return super().find_class(f"gymnasium{dot}{rest}" if package == "gym" else module, name)


def read_pickle(stream: BinaryIO) -> Any:
    """The object of a pickle. It can fail in any way: what it imports may not be here."""
    return _Unpickler(stream).load()
