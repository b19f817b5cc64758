"""What Orbax and TensorStore leave behind of a save of a checkpoint that fails: files, and writes
that end later."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from pathlib import Path
from typing import Any

UNFINISHED = ".orbax-checkpoint-tmp"
"""Part of the name of a step that is still being written."""
REMOVALS, SETTLES = 20, 0.05
"""Number of attempts to delete the folder of a failed save, and seconds between them."""


class LateWrites:
    """Tells Python to print nothing of writes that end after the save has failed.

    At the first error of a save Orbax closes the event loop in which TensorStore's threads announce
    the end of their writes. Each later one then raises an error that no caller can catch, and of
    which Python prints a traceback.
    """

    def __init__(self) -> None:
        self.before: Any = None

    def ignore(self) -> None:
        """From the beginning of a save on; after one that failed, as long as the process lives,
        since nobody knows when the last write ends."""
        if self.before is None:
            self.before, sys.unraisablehook = sys.unraisablehook, self._hook

    def report(self) -> None:
        """Nothing is being written any more: show every error again."""
        if self.before is not None and sys.unraisablehook == self._hook:
            sys.unraisablehook, self.before = self.before, None

    def _hook(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed" or unraisable.object is not None:
            self.before(unraisable)


def unfinished(folder: Path) -> list[Path]:
    """The folders of steps that are being written, or were when a process was killed."""
    return [entry for entry in folder.iterdir() if UNFINISHED in entry.name]


def remove_unfinished(folder: Path) -> None:
    """Delete what a save that failed has written, as far as that is possible.

    Writes that have not ended put files and folders back for a moment.
    """
    with contextlib.suppress(OSError):
        for _ in range(REMOVALS):
            for path in unfinished(folder):
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(SETTLES)
            if not unfinished(folder):
                return
