"""Turn every exception that ends a command into one line and an exit status.

The status is 2 for bad input, and 1 for all other failures, including SIGINT and SIGTERM. An
exception that mukv does not raise on purpose is reported as a fault of mukv, with file and line.
MUKV_TRACEBACK=1 shows the traceback of any error.
"""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

import typer

from mukv.core.errors import LONGEST_VALUE, BadInput, Failed
from mukv.core.names import shortened

TRACEBACK = "MUKV_TRACEBACK"
"""Environment variable: 1 to print the traceback of an error before its line."""
MISTYPED = {
    *(errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO, errno.EINVAL),
}
"""Errors of the file system that are caused by the path that the user gave: they are bad input."""
PACKAGE = Path(__file__).parents[1]
SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Discarding(io.TextIOWrapper):
    """The null device in place of a standard output that was closed before we began.

    discarded: whether anything was written
    """

    discarded = False

    def __init__(self) -> None:
        null = open(os.devnull, "wb")  # noqa: SIM115
        super().__init__(null, encoding="utf-8", errors="backslashreplace")

    def write(self, text: str, /) -> int:
        """Note that text is lost."""
        self.discarded = self.discarded or bool(text)
        return super().write(text)


class Signalled(SystemExit):
    """Raised to end the command on a signal, so that locks are released and temporary files are
    removed."""

    def __init__(self, number: int) -> None:
        self.line, self.status = SIGNALS[signal.Signals(number)], 1
        super().__init__(self.status)


@contextmanager
def signals() -> Iterator[None]:
    """Raise Signalled for the first SIGINT or SIGTERM in this block.

    Python raises it only when the current call into a library returns (a compilation may take a
    minute). A second signal kills the process. A signal that was ignored when the process started
    (nohup, for instance) stays ignored.
    """
    usual = (signal.SIG_DFL, signal.default_int_handler)
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in SIGNALS if here}

    def leave(number: int, _: FrameType | None) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Signalled(number)

    for number, handler in before.items():
        if handler in usual:
            signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is leave:
                signal.signal(number, handler)


def told(error: BaseException) -> tuple[str, int]:
    """Return the line to print (without "error: ") and the exit status for an exception.

    The line is empty if there is nothing to print: help was shown, or the output pipe is closed.
    """
    if isinstance(error, BadInput | Failed):
        return text_of(error), error.status
    if isinstance(error, typer.Exit):
        return "", error.exit_code
    if isinstance(error, typer.Abort):
        return "", 1
    if isinstance(error, Signalled):
        return error.line, error.status
    if isinstance(error, BrokenPipeError):
        return "", 1
    if hasattr(error, "format_message"):  # click's own text for a wrong option
        return shortened(error.format_message(), 900), 2  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text_of(error):
        detail = text_of(error)
        return "not enough memory" + (f" ({detail})" if detail else ""), 1
    return _of_fault(error), 1


def text_of(error: BaseException) -> str:
    """Return the first line of an exception's text; empty if it has none or if str() fails."""
    try:
        lines = str(error).split("\n") if isinstance(error, BadInput | Failed) else _lines(error)
    except Exception:
        return ""
    return shortened(" ".join(lines).strip(), 960)


def _lines(error: BaseException) -> list[str]:
    return str(error).strip().splitlines()[:1]


def _of_system(error: OSError) -> tuple[str, int]:
    name = error.filename
    path = os.fsdecode(name) if isinstance(name, str | bytes) else "" if name is None else str(name)
    reason = error.strerror or text_of(error) or type(error).__name__
    line = f"{shortened(path, LONGEST_VALUE)}: {reason}" if path else str(reason)
    return line, 2 if path and error.errno in MISTYPED else 1


def _of_fault(error: BaseException) -> str:
    detail = shortened(text_of(error), 400)
    what = f"{type(error).__name__}: {detail}" if detail else type(error).__name__
    hint = f"{TRACEBACK}=1 shows the traceback"
    return f"this is a fault of mukv: {what} ({place_of(error)}); {hint}"


def place_of(error: BaseException) -> str:
    """Return FILE:LINE of the innermost frame in mukv's source, or else of the innermost frame."""
    frames = [
        (Path(f.f_code.co_filename), line) for f, line in traceback.walk_tb(error.__traceback__)
    ]
    ours = [(file, line) for file, line in frames if PACKAGE in file.parents]
    for file, line in reversed(ours or frames):
        inside = file.relative_to(PACKAGE.parent) if PACKAGE in file.parents else file
        return f"{inside}:{line}"
    return "no place known"


def show_traceback(error: BaseException) -> None:
    """Print the traceback to standard error if the environment variable MUKV_TRACEBACK is 1."""
    if os.environ.get(TRACEBACK) == "1" and sys.stderr is not None:
        traceback.print_exception(error)


def settle_streams() -> None:
    """Make printing safe: characters that a stream can't encode are escaped, and a closed stream is
    replaced by the null device. `flush` reports what was written to a closed standard output."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before we began
            setattr(sys, name, Discarding())
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Flush standard output. Raises BrokenPipeError if its reader is gone, and Failed if it was
    closed before something was written, or for any other error."""
    if isinstance(sys.stdout, Discarding) and sys.stdout.discarded:
        raise Failed("standard output is closed: the result could not be printed")
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would flush again at exit and print a second error: send that to the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        if isinstance(error, BrokenPipeError):
            raise
        raise Failed(f"standard output: {error.strerror or error}") from error
