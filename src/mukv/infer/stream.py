"""Print a model's text while it is decoded."""

from __future__ import annotations

import codecs
from typing import TextIO

from rich.text import Text

from mukv.data.tokenizer import AnyTokenizer
from mukv.show.terminal import Console


class TokenStream:
    """Prints tokens as they are decoded, holding back the bytes of an incomplete character.

    opening: text printed before the first token; None for none
    """

    def __init__(self, tokenizer: AnyTokenizer, out: TextIO, opening: Text | None = None):
        self.tokenizer, self.out, self.opening = tokenizer, out, opening
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self, fresh: list[list[int]]) -> None:
        """Print the new tokens of the first row."""
        if self.opening:
            Console(file=self.out).print(self.opening, end="", soft_wrap=True)
            self.opening = None
        data = b"".join(self.tokenizer.token_data(token) for token in fresh[0])
        self.out.write(self.decoder.decode(data))
        self.out.flush()

    def end(self) -> None:
        """Print what is still held back, with replacement characters."""
        self.out.write(self.decoder.decode(b"", final=True) + "\n")
        self.out.flush()
