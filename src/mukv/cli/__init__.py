"""The command `mukv`: subcommands that read as sentences.

Standard output is for results, one JSON object as the last line with `--json`; progress and errors
go to standard error. Exit status 0, 1 (failed) or 2 (bad input). A command is a function in one of
the modules here; it imports what it needs when it runs, so that a wrong one is answered at once.
"""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence
from typing import NoReturn

import typer

from mukv import launch, output
from mukv.cli import benching, converting, judging, looking, making, scaling, using
from mukv.cli.app import app
from mukv.core.errors import BadInput, Failed
from mukv.core.json_text import is_text

__all__ = [
    "app",
    "benching",
    "converting",
    "judging",
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
    """Run the command line; every error that we know ends in one clear line."""
    launch.restart_with_allocator()
    try:
        _require_text(sys.argv[1:])
        code = app(prog_name="mukv", standalone_mode=False)
    except (BadInput, Failed) as error:
        output.complain(str(error), error.status)
    except typer.Exit as exit:
        code = exit.exit_code
    except typer.Abort:
        code = 1
    except KeyboardInterrupt:
        output.complain("interrupted", 1)
    except Exception as error:
        # Wrong options: click knows best how to say it; where it showed the help it is silent.
        if hasattr(error, "format_message"):
            message = error.format_message()  # pyright: ignore[reportAttributeAccessIssue]
            if message:
                output.complain(message, 2)
            raise SystemExit(2) from None
        if isinstance(error, OSError):
            output.complain(str(error), 2 if error.errno == errno.ENAMETOOLONG else 1)
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            output.complain(f"not enough memory ({str(error).splitlines()[0]})", 1)
        raise
    raise SystemExit(code or 0)
