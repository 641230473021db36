"""SIGTERM, which job schedulers send before they kill: a run saves a checkpoint, says how to go on, and ends.

The same command goes on by itself when it is started again, as a scheduler does that puts the job back into its queue:
the folder of a run that ended so bears a mark.
"""

import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from mua_rl.errors import Terminated
from mua_rl.run.folder import MARK, RunFolder, folder_name, with_whole_paths


class Termination:
    """Whether this process was asked to end.

    Attributes:
        asked: Whether SIGTERM has come.
        stage: Where the run is, for the message.
    """

    def __init__(self) -> None:
        self.asked, self.stage = False, "before its first step"
        self._deferred = False

    @contextmanager
    def watched(self) -> Iterator["Termination"]:
        """Within the block, SIGTERM raises `Terminated`, or is noted where it is deferred."""

        def note(*_: object) -> None:
            self.asked = True
            if not self._deferred:
                raise Terminated(f"the run was ended by SIGTERM {self.stage}: the same command goes on with it")

        try:
            before = signal.signal(signal.SIGTERM, note)
        except ValueError:  # signals belong to the main thread
            yield self
            return
        try:
            yield self
        finally:
            signal.signal(signal.SIGTERM, before)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Within the block, SIGTERM is noted in `asked`, so that the work in hand can be finished and saved."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred, self.stage = False, "after its last step"

    @contextmanager
    def marked(self, run: RunFolder) -> Iterator[None]:
        """Within the block, a run that is ended leaves the mark by which the same command finds it."""
        try:
            yield
        except Terminated:
            (run.path / MARK).touch()
            raise

    def leave(self, run: RunFolder, steps: int) -> NoReturn:
        """End a run whose last step was saved.

        Raises:
            Terminated: Always; the message says how to go on.
        """
        raise Terminated(
            f"the run was ended by SIGTERM and saved after step {steps}: the same command goes on with it, or --resume "
            f"{run.path}"
        )


def terminated_run(output_dir: str | None, name: str, settings: Mapping[str, Any]) -> Path | None:
    """The folder of a run that SIGTERM has ended and that was asked the same, if there is one.

    Args:
        output_dir: Where the run was to go; `None`: under `runs/`, called after `name`.
        name: As `open_run` takes it.
        settings: What was asked.
    """
    asked = {**with_whole_paths(dict(settings)), "output_dir": None}
    folders = [Path(output_dir)] if output_dir else sorted(Path("runs").glob(f"{folder_name(name)}-*"))
    for folder in folders:
        if (folder / MARK).exists() and {**RunFolder.open(str(folder)).settings(), "output_dir": None} == asked:
            return folder
    return None
