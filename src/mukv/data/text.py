"""Read all documents of all sources as a stream of pieces of valid UTF-8.

A document of up to 1 MiB is one piece, and a longer one is read in blocks, so that a document of
any size fits in memory. sources.py opens the documents.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, get_args

from mukv.core.errors import BadInput, unknown_name
from mukv.data.sources import open_source, telling_read_errors

WHOLE_BYTES = 1 << 20
"""Longest text that is one piece; longer texts are read in blocks of `BLOCK_BYTES`."""
BLOCK_BYTES = 1 << 16
Invalid = Literal["strict", "replace", "skip"]


class TextPiece(NamedTuple):
    """Valid UTF-8 that is tokenised at once: a document, or a block of a long one.

    name: document, for messages
    data: the text
    first: whether a document begins here
    long: whether the document came in blocks
    """

    name: str
    data: bytes
    first: bool
    long: bool = False


def pieces(
    sources: Sequence[str],
    field: str = "text",
    on_invalid: str = "strict",
    spools: Path | None = None,
) -> Iterator[TextPiece]:
    """Yield all documents of all sources, those beyond 1 MiB in blocks of 64 KiB cut at line ends.

    field: name of the text in JSONL, Parquet and data sets
    on_invalid: treatment of text that is not UTF-8: "strict" raises BadInput, "replace" inserts
        U+FFFD, "skip" leaves the piece out
    spools: folder in which what remote sources sent is kept, so that it is not fetched again; None
        keeps nothing

    Empty documents are left out. Raises BadInput for a source that can't be read.
    """
    if on_invalid not in get_args(Invalid):
        raise unknown_name("on_invalid", on_invalid, get_args(Invalid))
    opened = [
        open_source(source, field, spools) for source in sources
    ]  # raises for unknown names first
    for source in opened:
        for name, file in source:
            first, offset = True, 0
            with file, telling_read_errors(name):
                for block, long in _blocks(file):
                    valid = _valid(name, block, offset, on_invalid)
                    offset += len(block)
                    if valid:
                        yield TextPiece(name, valid, first, long)
                    first = not valid


def _blocks(file: BinaryIO) -> Iterator[tuple[bytes, bool]]:
    """Yield a short document as one block, and a long one in blocks; and whether it is a long one.
    A block ends after a line if possible, otherwise before a space, otherwise after a character.
    """
    rest = file.read(WHOLE_BYTES + 1)
    if len(rest) <= WHOLE_BYTES:
        yield rest, False
        return
    while rest:
        if len(rest) <= BLOCK_BYTES:
            rest += file.read(WHOLE_BYTES)
        cut = min(len(rest), BLOCK_BYTES)
        if cut < len(rest):
            half = cut // 2
            cut = rest.rfind(b"\n", half, cut) + 1 or max(rest.rfind(b" ", half, cut), 0) or cut
            # Continuation bytes of UTF-8 are 10xxxxxx; no character has more than three.
            for _ in range(3):
                cut -= rest[cut] & 0xC0 == 0x80
        yield rest[:cut], True
        rest = rest[cut:]


def _valid(name: str, data: bytes, offset: int, on_invalid: str) -> bytes:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if on_invalid == "skip":
            return b""
        if on_invalid == "replace":
            return data.decode(errors="replace").encode()
        place = offset + error.start
        given = f"byte 0x{data[error.start]:02x} at offset {place}"
        raise BadInput(
            name, given, "UTF-8 text; other text can be handled by replace or skip"
        ) from None
    return data
