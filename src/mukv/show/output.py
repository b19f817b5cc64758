"""What a command says: results on standard output, errors and notes on standard error.

Imports nothing heavy, so that a wrong command line is answered at once.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any, NoReturn

from mukv.show.terminal import Console, styled
from mukv.storage.json_text import to_json


def complain(message: str, status: int) -> NoReturn:
    """Say what went wrong on one line, and leave."""
    text = styled(("error: ", "bold red"), message)
    Console(stderr=True).print(text, soft_wrap=True)
    raise SystemExit(status)


def warn(message: str) -> None:
    """Say on one line of standard error what is not as it may seem."""
    text = styled(("note: ", "bold yellow"), message)
    Console(stderr=True).print(text, soft_wrap=True)


def print_json(facts: Any) -> None:
    """One object, as the last line."""
    sys.stdout.write(to_json(facts) + "\n")
    sys.stdout.flush()


def print_facts(facts: Mapping[str, Any], as_json: bool) -> None:
    """Named values, one a line or as one object."""
    if as_json:
        print_json(facts)
        return
    for name, value in facts.items():
        Console().say(f"{name}: {value}")
