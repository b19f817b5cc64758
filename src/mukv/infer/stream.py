"""Print a model's text while it is decoded."""

from __future__ import annotations

import codecs
from typing import TextIO

from rich.text import Text

from mukv.data.tokenizer import AnyTokenizer
from mukv.show.terminal import Console


class TokenStream:
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
