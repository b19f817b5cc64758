"""What a command says: results on standard output, errors and notes on standard error.

Imports nothing heavy, so that a wrong command line is answered at once.
"""

from __future__ import annotations

import codecs
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from rich.text import Text

from mukv.show.terminal import Console, styled
from mukv.storage.json_text import to_json

if TYPE_CHECKING:
    from mukv.data.tokenizer import AnyTokenizer


def complain(message: str, status: int) -> NoReturn:
    """Say what went wrong on one line, and leave."""
    text = styled(("error: ", "bold red"), " ".join(message.split()))
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


class Stream:
    """Prints tokens as they come, holding back the bytes of a character that is not complete.

    opening: what stands before the first ones.
    """

    def __init__(self, tokenizer: AnyTokenizer, out: TextIO, opening: Text | None = None):
        self.tokenizer, self.out, self.opening = tokenizer, out, opening
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self, fresh: list[list[int]]) -> None:
        """New tokens of each row; the first row is shown."""
        if self.opening:
            Console(file=self.out).print(self.opening, end="", soft_wrap=True)
            self.opening = None
        data = b"".join(self.tokenizer.token_data(token) for token in fresh[0])
        self.out.write(self.decoder.decode(data))
        self.out.flush()

    def end(self) -> None:
        """Show what is still held back, as what it is."""
        self.out.write(self.decoder.decode(b"", final=True) + "\n")
        self.out.flush()
