"""The command `mukv`: subcommands that read as sentences.

Standard output is for results, one JSON object as the last line with `--json`; progress and errors
go to standard error. Exit status 0, 1 (failed) or 2 (bad input). A command is a function in one of
the modules here; it imports what it needs when it runs, so that a wrong one is answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import NoReturn

from mukv.cli import (
    benching,
    converting,
    ending,
    judging,
    launch,
    listing,
    looking,
    making,
    scaling,
    using,
)
from mukv.cli.app import app
from mukv.core.errors import BadInput, Failed
from mukv.show import output
from mukv.show.heartbeat import Heartbeat
from mukv.storage.json_text import is_text

__all__ = [
    "app",
    "benching",
    "converting",
    "judging",
    "listing",
    "looking",
    "main",
    "making",
    "scaling",
    "using",
]


def _require_text(words: Sequence[str]) -> None:
    """Raise BadInput for bytes that are not UTF-8: no file of ours could name such a path."""
    for word in words:
        if not is_text(word):
            raise BadInput("mukv", word, "names and values in UTF-8")


def main() -> NoReturn:
    """Run the command line; every exception ends in one clear line at most."""
    ending.settle_streams()
    # Processes that share a run would all print; their first one shows its progress.
    alone = not any(part.startswith("--distributed") for part in sys.argv)
    beat = Heartbeat(" ".join(["mukv", *sys.argv[1:2]])) if alone else nullcontext()
    try:
        with ending.signals():
            launch.restart_with_allocator()
            _require_text(sys.argv[1:])
            with beat:
                code = app(prog_name="mukv", standalone_mode=False)
            ending.flush()
    except BaseException as error:  # a panic of a Rust library is no Exception
        if isinstance(error, SystemExit) and not isinstance(error, ending.Signalled):
            raise
        ending.show_traceback(error)
        message, code = ending.told(error)
        with suppress(OSError, Failed):
            ending.flush()
        with suppress(OSError):  # standard error may be closed as well
            if message:
                output.complain(message, code)
    raise SystemExit(code or 0)
