"""Keep rows of a remote source on disk, so that a repeated command continues after a kill.

A spool is a folder of parts, 000000.part and so on. A part is one line of JSON (`cursor`: the place
after its last row; `ended`: whether the source ended there; `names` and `sizes` of its rows), then
the texts in UTF-8. Parts are written whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput, Failed
from mukv.data.remote import Reliable, RemoteRows, Row
from mukv.storage.files import write_atomic

PART_BYTES = 1 << 22
"""Bytes of text after which a part is written: what a kill loses at most."""
PART_ROWS = 1 << 15
"""Rows after which a part is written."""


def spooled(rows: RemoteRows, field: str, folder: Path) -> Iterator[Row]:
    """Yield the rows of a source: first those of its spool in `folder`, then those that follow,
    which are added to the spool.

    field: the text field, part of the spool's name. Raises BadInput for a damaged spool.
    """
    digest = hashlib.sha256(json.dumps([rows.name, field]).encode()).hexdigest()[:16]
    folder = folder / digest
    cursor, ended, number = None, False, 0
    while (path := folder / f"{number:06}.part").exists():
        head, kept = _read(path)
        cursor, ended = head["cursor"], head["ended"]
        yield from kept
        number += 1
    if not ended:
        yield from _fetched(rows, cursor, folder, number)


def _fetched(rows: RemoteRows, cursor: Any, folder: Path, number: int) -> Iterator[Row]:
    """Yield and keep the rows after a cursor, in parts from `number` on."""
    source = Reliable(rows, cursor)
    kept: list[tuple[str, bytes | None]] = []
    size = 0

    def write(ended: bool = False) -> None:
        _write(folder / f"{number:06}.part", kept, source.cursor(), ended)

    try:
        for row in source:
            if row.value is not None and not isinstance(row.value, str):
                kept.clear()  # the next try meets this row again
                yield row  # the reader refuses it
                return
            text = None if row.value is None else row.value.encode(errors="surrogatepass")
            kept.append((row.name, text))
            size += len(text or b"")
            if size >= PART_BYTES or len(kept) == PART_ROWS:
                write()
                kept, size, number = [], 0, number + 1
            yield row
    except (GeneratorExit, Failed):  # the reader has enough, or the network is gone
        if kept:
            write()
        raise
    write(ended=True)


def _write(path: Path, kept: list[tuple[str, bytes | None]], cursor: Any, ended: bool) -> None:
    names, texts = [name for name, _ in kept], [text for _, text in kept]
    sizes = [None if text is None else len(text) for text in texts]
    head = {"cursor": cursor, "ended": ended, "names": names, "sizes": sizes}
    write_atomic(path, json.dumps(head).encode() + b"\n" + b"".join(text or b"" for text in texts))


def _read(path: Path) -> tuple[dict[str, Any], list[Row]]:
    """Read a part. Raises BadInput for one that mukv did not write whole."""
    line, _, data = path.read_bytes().partition(b"\n")
    try:
        head = json.loads(line)
        sizes = head["sizes"]
        if sum(size or 0 for size in sizes) != len(data):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        allowed = "a part of a spool; delete its folder to fetch the source again"
        raise BadInput(str(path), "a damaged file", allowed) from None
    rows, place = [], 0
    for name, size in zip(head["names"], sizes, strict=True):
        text = data[place : place + (size or 0)]
        rows.append(Row(name, None if size is None else text.decode(errors="surrogatepass")))
        place += size or 0
    return head, rows
