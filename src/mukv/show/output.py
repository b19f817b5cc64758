"""Print a command's output: results to standard output, errors and notes to standard error.

Imports nothing heavy, so that a wrong command line is answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from mukv.show.terminal import Console, styled
from mukv.storage.json_text import to_json

Tell = Callable[[str], None]
"""Function that prints one line, such as `warn`."""


def complain(message: str, status: int) -> NoReturn:
    """Print an error on one line and exit with `status`."""
    text = styled(("error: ", "bold red"), message)
    Console(stderr=True).print(text, soft_wrap=True)
    raise SystemExit(status)


def warn(message: str) -> None:
    """Print a note on one line of standard error."""
    text = styled(("note: ", "bold yellow"), message)
    Console(stderr=True).print(text, soft_wrap=True)


def print_json(facts: Any) -> None:
    """Print a JSON object as the last line."""
    sys.stdout.write(to_json(facts) + "\n")
    sys.stdout.flush()


def print_summary(
    facts: Mapping[str, Any], lines: Mapping[str, str], where: str | None, as_json: bool
) -> None:
    """Print what a command found or made, as one JSON object or in words.

    facts: the fields of the object
    lines: what is printed in words: a name and a text for each line
    where: last line, which says where the result was written, such as "run: runs/NAME"
    """
    if as_json:
        print_json(facts)
        return
    width = max(map(len, lines))
    for name, text in lines.items():
        Console().say(f"{name:{width}}  {text}")
    if where is not None:
        Console().say(where)
