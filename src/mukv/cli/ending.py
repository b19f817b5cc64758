"""How a command ends: every exception becomes one line and a status.

Status 1 is for what went wrong at run time, the signals SIGINT and SIGTERM included, and 2 for bad
input. An exception that no part of mukv expects is reported as a fault of mukv, with its place in
the source; MUKV_TRACEBACK=1 shows the traceback of any error.
"""

from __future__ import annotations

import errno
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
"""Errors of the file system that another path mends."""
PACKAGE = Path(__file__).parents[1]
SIGNALS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}


class Signalled(SystemExit):
    """A signal ends the command. Locks are released and temporary files removed on the way."""

    def __init__(self, number: int) -> None:
        self.line, self.status = SIGNALS[signal.Signals(number)], 1
        super().__init__(self.status)


@contextmanager
def signals() -> Iterator[None]:
    """Raise Signalled for SIGINT and SIGTERM in this block.

    Python raises it when the library call that runs ends (a compilation may take a minute). A
    signal after that kills the process. Signals that it was started to ignore stay ignored.
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
    """The line (without "error: ") and the status that an exception ends a command with.

    The line is empty where nothing is left to say: help was shown, or nobody reads the output.
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
    if hasattr(error, "format_message"):  # click says best what is wrong with an option
        return shortened(error.format_message(), 900), 2  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(error, OSError):
        return _of_system(error)
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text_of(error):
        said = text_of(error)
        return "not enough memory" + (f" ({said})" if said else ""), 1
    return _of_fault(error), 1


def text_of(error: BaseException) -> str:
    """The first line of an exception's text; empty if there is none or it can't be made."""
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
    said = shortened(text_of(error), 400)
    what = f"{type(error).__name__}: {said}" if said else type(error).__name__
    hint = f"{TRACEBACK}=1 shows the traceback"
    return f"this is a fault of mukv: {what} ({place_of(error)}); {hint}"


def place_of(error: BaseException) -> str:
    """FILE:LINE of the last line of mukv that an exception passed, or of its origin."""
    frames = [
        (Path(f.f_code.co_filename), line) for f, line in traceback.walk_tb(error.__traceback__)
    ]
    ours = [(file, line) for file, line in frames if PACKAGE in file.parents]
    for file, line in reversed(ours or frames):
        inside = file.relative_to(PACKAGE.parent) if PACKAGE in file.parents else file
        return f"{inside}:{line}"
    return "no place known"


def show_traceback(error: BaseException) -> None:
    """Print it to standard error, where that was asked for."""
    if os.environ.get(TRACEBACK) == "1" and sys.stderr is not None:
        traceback.print_exception(error)


def settle_streams() -> None:
    """Let no character and no closed stream stop a command from saying what it has to say."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed before we began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Write what standard output still holds. Raises OSError where that is not possible."""
    try:
        sys.stdout.flush()
    except OSError as error:
        # Python would try again at exit, and complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.__stdout__.fileno() if sys.__stdout__ else 1)
        if isinstance(error, BrokenPipeError):
            raise
        raise Failed(f"standard output: {error.strerror or error}") from error
