"""Messages between the process of the tests and the process of the untrusted code."""

import json
import os
from typing import Any

MAX_MESSAGE_BYTES = 32 << 20
"""Longest message that is accepted; a longer one is refused before any of it is decoded."""


class WireError(Exception):
    """A value that cannot cross, or a message that is not one of ours."""


class TooLarge(WireError):
    """A value that is nested too deeply, or a message that is too long."""


class Closed(Exception):
    """The other process has gone."""


class Channel:
    """Length-prefixed JSON messages over a stream socket's file descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._received = b""

    def send(self, text: str) -> None:
        """Send one message, JSON text.

        Raises:
            TooLarge: It is longer than `MAX_MESSAGE_BYTES`.
            Closed: Nobody is there to read it.
        """
        data = text.encode()
        if len(data) > MAX_MESSAGE_BYTES:
            raise TooLarge("message too long")
        view = memoryview(len(data).to_bytes(4, "big") + data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as error:
            raise Closed from error

    def receive(self) -> Any:
        """The next message, as JSON data that nothing has been checked about.

        Raises:
            WireError: Too long, or not JSON.
            Closed: No further message will come.
        """
        size = int.from_bytes(self._read(4), "big")
        if size > MAX_MESSAGE_BYTES:
            raise TooLarge("message too long")
        try:
            return json.loads(self._read(size))
        except (ValueError, RecursionError) as error:
            raise WireError("not JSON") from error

    def _read(self, size: int) -> bytes:
        chunks, missing = [self._received], size - len(self._received)
        while missing > 0:
            try:
                chunk = os.read(self._fd, max(missing, 1 << 16))
            except OSError as error:
                raise Closed from error
            if not chunk:
                raise Closed
            chunks.append(chunk)
            missing -= len(chunk)
        data = b"".join(chunks)
        self._received = data[size:]
        return data[:size]
