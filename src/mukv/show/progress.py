"""Show the progress of long work: steps done, time left, loss.

On a terminal this is a live line, elsewhere (a log file, CI) a plain line at intervals. Everything
goes to standard error, so that standard output has only results.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TimeRemainingColumn

from mukv.core.names import printable
from mukv.show.heartbeat import duration
from mukv.show.terminal import Console, column

QUIET_SECONDS = 9.0
"""Longest time between two lines where the output is not a terminal."""


def say(text: str) -> None:
    """Print a permanent line to standard error."""
    Console(stderr=True).say(text)


class Bar:
    """Progress of one task of known size, with changing numbers beside it."""

    def __init__(self, title: str, total: int, start: int = 0, silent: bool = False):
        """start: steps done before
        silent: show nothing
        """
        self.console = Console(stderr=True, quiet=silent)
        self.title, self.total, self.start = printable(title), total, start
        self.began: tuple[float, int] | None = None
        self.last_line = 0.0
        self.live: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> Self:
        if self.console.is_terminal:
            self.live = Progress(
                column("task.description", "bold"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                column("task.fields[numbers]"),
                console=self.console,
                transient=True,
            )
            self.live.start()
            self.task = self.live.add_task(
                self.title, total=self.total, completed=self.start, numbers=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self.live:
            self.live.stop()

    def show(self, done: int, numbers: Mapping[str, str]) -> None:
        """Update the line. done: steps done, of `total`; numbers: formatted values by name."""
        text = printable("  ".join(f"{name} {value}" for name, value in numbers.items()))
        if self.live:
            self.live.update(self.task, completed=done, numbers=text)
            return
        now = time.monotonic()
        if now - self.last_line < QUIET_SECONDS and done < self.total:
            return
        # Count from the first report, because compilation comes before it.
        self.began = self.began or (now, done)
        seconds, steps = now - self.began[0], done - self.began[1]
        left = ""
        if steps and done < self.total:
            left = f"{duration((self.total - done) * seconds / steps)} left  "
        self.console.say(f"{self.title} {done}/{self.total}  {left}{text}")
        self.last_line = now

    def say(self, text: str) -> None:
        """Print a permanent line."""
        self.console.say(text)
