"""Clean up after a failed save: delete the files of Orbax and TensorStore, and silence the errors
of writes that end later."""

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
    """Suppresses the errors of writes that end after their save has failed.

    At the first error of a save, Orbax closes the event loop to which TensorStore's threads report
    the end of their writes. Each report after that raises an error that no caller can catch, and
    Python prints its traceback.
    """

    def __init__(self) -> None:
        self.before: Any = None

    def ignore(self) -> None:
        """Suppress such errors from now on. Called when a save begins; after a failed save the
        effect remains, because it is not known when the last write ends."""
        if self.before is None:
            self.before, sys.unraisablehook = sys.unraisablehook, self._hook

    def report(self) -> None:
        """Show all errors again. Called when all writes have ended."""
        if self.before is not None and sys.unraisablehook == self._hook:
            sys.unraisablehook, self.before = self.before, None

    def _hook(self, unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed" or unraisable.object is not None:
            self.before(unraisable)


def unfinished(folder: Path) -> list[Path]:
    """Return the folders of steps that are being written, or that a killed process was writing."""
    return [entry for entry in folder.iterdir() if UNFINISHED in entry.name]


def remove_unfinished(folder: Path) -> None:
    """Delete the files of a failed save, as far as possible.

    The deletion is repeated, because writes that have not ended may create files and folders again.
    """
    with contextlib.suppress(OSError):
        for _ in range(REMOVALS):
            for path in unfinished(folder):
                shutil.rmtree(path, ignore_errors=True)
            time.sleep(SETTLES)
            if not unfinished(folder):
                return
