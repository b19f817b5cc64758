"""A heartbeat: a line on standard error when a command has printed nothing for a while.

Compilation and long single steps print nothing; a person must see that the command is alive.
Imports nothing heavy, so that a wrong command line is answered at once.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import Any, Self, TextIO

QUIET_SECONDS = 9.0
"""Longest time without output; the documentation promises a line within 10 seconds."""


def duration(seconds: float) -> str:
    """Format a time: "42 s", "2 min 10 s", "12 min", "3 h 05 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 599.5:
        return f"{round(seconds) // 60} min {round(seconds) % 60:02} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


class _Watched:
    """Stream that records when it was last written to."""

    def __init__(self, stream: TextIO, beat: Heartbeat):
        self._stream, self._beat = stream, beat

    def write(self, text: str) -> int:
        self._beat.last = time.monotonic()
        return self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Heartbeat:
    """Context manager that prints "TITLE: still working, 20 s" whenever neither standard output nor
    standard error was written to for `quiet` seconds.
    """

    def __init__(self, title: str, quiet: float = QUIET_SECONDS):
        self.title, self.quiet = title, quiet
        self.began = self.last = time.monotonic()
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self.streams = sys.stdout, sys.stderr
        self.watched = _Watched(sys.stdout, self), _Watched(sys.stderr, self)
        sys.stdout, sys.stderr = self.watched  # pyright: ignore[reportAttributeAccessIssue]
        self.thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.over.set()
        # If other code has replaced the streams meanwhile, it restores them itself.
        if sys.stdout is self.watched[0]:
            sys.stdout = self.streams[0]
        if sys.stderr is self.watched[1]:
            sys.stderr = self.streams[1]
        self.thread.join()

    def _run(self) -> None:
        while not self.over.wait(max(0.0, self.last + self.quiet - time.monotonic())):
            now = time.monotonic()
            if now - self.last >= self.quiet:
                self.watched[1].write(
                    f"{self.title}: still working, {duration(now - self.began)}\n"
                )
                self.watched[1].flush()
