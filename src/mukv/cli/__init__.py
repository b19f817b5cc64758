"""The command line `mukv`. Each subcommand is a function in one of the modules of this package.

Results are printed to standard output, with `--json` as one JSON object on the last line; progress
and errors go to standard error. The exit status is 0, 1 (failed) or 2 (bad input). Commands import
JAX and other large modules when they run, so that a mistyped command line is refused at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import NoReturn

from mukv.cli import (
    analysis,
    benchmark,
    chat,
    compression,
    ending,
    exchange,
    inference,
    launch,
    listing,
    training,
    tuning,
)
from mukv.cli.app import app
from mukv.core.errors import BadInput, Failed
from mukv.show import output
from mukv.show.heartbeat import Heartbeat
from mukv.storage.json_text import is_text

__all__ = [
    "analysis",
    "app",
    "benchmark",
    "chat",
    "compression",
    "exchange",
    "inference",
    "listing",
    "main",
    "training",
    "tuning",
]


def _require_text(words: Sequence[str]) -> None:
    """Raise BadInput for words that are not UTF-8: config.yaml and JSON can't hold such a path."""
    for word in words:
        if not is_text(word):
            raise BadInput("mukv", word, "names and values in UTF-8")


def main() -> NoReturn:
    """Run the command line and exit; an exception prints at most one line."""
    ending.settle_streams()
    # No heartbeat with --distributed: all processes would print it, and training shows progress.
    alone = not any(part.startswith("--distributed") for part in sys.argv)
    # A chat waits for input; it starts a heartbeat for each answer itself.
    watched = alone and sys.argv[1:2] != ["chat"]
    beat = Heartbeat(" ".join(["mukv", *sys.argv[1:2]])) if watched else nullcontext()
    try:
        with ending.signals():
            launch.restart_with_allocator()
            _require_text(sys.argv[1:])
            if not sys.flags.safe_path and "" not in sys.path and os.getcwd() not in sys.path:
                sys.path.append(os.getcwd())  # parts that YAML names by their dotted path
            with beat:
                code = app(prog_name="mukv", standalone_mode=False)
            ending.flush()
    except BaseException as error:  # a panic in a Rust library is not an Exception
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
