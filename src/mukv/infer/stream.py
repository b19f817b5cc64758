"""Print a model's text while it is decoded."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import TextIO

from rich.text import Text

from mukv.data.tokenizer import AnyTokenizer
from mukv.show.terminal import Console


class TokenStream:
    """Text of successive tokens, printed as they are decoded.

    Bytes of an incomplete character, and text that may be the beginning of a stop text, are held
    back.

    out: where text is printed; None for nowhere
    opening: text printed before the first token; None for none
    stop: texts before which the text ends
    """

    def __init__(
        self,
        tokenizer: AnyTokenizer,
        out: TextIO | None,
        opening: Text | None = None,
        stop: Sequence[str] = (),
    ):
        self.tokenizer, self.out, self.opening, self.stop = tokenizer, out, opening, stop
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""
        self.printed = 0
        self.ended = False
        """Whether a stop text has occurred."""

    def show(self, fresh: list[list[int]]) -> None:
        """Print the new tokens of the first row."""
        if self.opening and self.out:
            Console(file=self.out).print(self.opening, end="", soft_wrap=True)
        self.opening = None
        self.add(fresh[0])

    def add(self, tokens: Sequence[int]) -> None:
        """Add new tokens of the text."""
        data = b"".join(self.tokenizer.token_data(token) for token in tokens)
        self._add(self.decoder.decode(data))

    def end(self) -> None:
        """Print the text that is still held back, with U+FFFD for incomplete characters."""
        self._add(self.decoder.decode(b"", final=True))
        self._print(len(self.text))
        if self.out:
            self.out.write("\n")
            self.out.flush()

    def _add(self, more: str) -> None:
        if self.ended:
            return
        self.text += more
        places = [self.text.find(stop) for stop in self.stop if stop in self.text]
        if places:
            self.text, self.ended = self.text[: min(places)], True
        self._print(len(self.text) if self.ended else len(self.text) - self._held())

    def _held(self) -> int:
        """Return the number of characters at the end that may begin a stop text."""
        longest = max(map(len, self.stop), default=0) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self.stop):
                return size
        return 0

    def _print(self, to: int) -> None:
        if self.out and to > self.printed:
            self.out.write(self.text[self.printed : to])
            self.out.flush()
            self.printed = to
