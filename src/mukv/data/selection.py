"""Which documents of the sources are kept: a range of lengths, and a number of bytes in all."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from mukv.core.errors import BadInput
from mukv.data.text import WHOLE_BYTES, TextPiece

UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


@dataclass
class Selection:
    """A filter of documents. Lengths and limit count bytes of UTF-8.

    limit: bytes of text at most; reading stops before the first document, or block of a document
        beyond 1 MiB, that would pass it. None means all
    min_length, max_length: bytes of a document; others are left out. At most 1 MiB, since longer
        documents are read in blocks; None means no bound

    After iterating, `bytes` and `documents` are what was kept, `left_out` the documents of another
    length, and `ended` tells whether the sources ended before the limit. Raises BadInput.
    """

    limit: int | None = None
    min_length: int | None = None
    max_length: int | None = None
    bytes: int = field(default=0, init=False)
    documents: int = field(default=0, init=False)
    left_out: int = field(default=0, init=False)
    ended: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise BadInput("limit", self.limit, "at least 1 byte")
        for name in ("min_length", "max_length"):
            length = getattr(self, name)
            if length is not None and not 1 <= length <= WHOLE_BYTES:
                raise BadInput(name, length, f"1 to {WHOLE_BYTES:,} bytes")
        if self.min_length and self.max_length and self.min_length > self.max_length:
            raise BadInput("min_length", self.min_length, f"at most max_length ({self.max_length})")

    @property
    def asked(self) -> dict[str, int]:
        """The bounds that are given, by name."""
        named = {name: getattr(self, name) for name in ("limit", "min_length", "max_length")}
        return {name: value for name, value in named.items() if value is not None}

    def of(self, pieces: Iterable[TextPiece]) -> Iterator[TextPiece]:
        """Yield the pieces that are kept. Raises BadInput for a limit below the first one."""
        self.bytes = self.documents = self.left_out = 0
        self.ended = False
        kept = True
        for piece in pieces:
            if piece.first:
                kept = self._fits(piece)
                self.left_out += not kept
            if not kept:
                continue
            if self.limit is not None and self.bytes + len(piece.data) > self.limit:
                if not self.bytes:
                    needed = f"at least the {len(piece.data):,} bytes of the first document"
                    raise BadInput("limit", self.limit, needed)
                return
            self.bytes += len(piece.data)
            self.documents += piece.first
            yield piece
        self.ended = True

    def _fits(self, first: TextPiece) -> bool:
        """Whether a document is kept, from its first piece: the whole of it unless it is long."""
        size = WHOLE_BYTES + 1 if first.long else len(first.data)
        return (self.min_length or 0) <= size <= (self.max_length or WHOLE_BYTES + 1)


def parse_size(text: str, where: str = "limit") -> int:
    """Return the bytes of a size such as 2GB, 500MB, 1.5GiB or 1000. Raises BadInput."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([A-Za-z]*)", text.strip(), re.ASCII)
    if match is None or match[2] not in UNITS:
        units = ", ".join(name for name in UNITS if name)
        raise BadInput(where, text, f"a number of bytes, such as 2GB; units: {units}")
    return int(float(match[1]) * UNITS[match[2]])
