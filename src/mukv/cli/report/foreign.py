"""Read CSV tables and PNG pictures from any source, with limits on size, or raise LeftOut."""

from __future__ import annotations

import csv
import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mukv.core.names import even, printable, shortened
from mukv.show.figures import CAPTION

MOST_BYTES = 32 << 20
MOST_ROWS, MOST_COLUMNS = 60, 60
"""Largest table that is shown. Of a larger table the page says that it was left out."""
LONGEST_CELL, LONGEST_CAPTION = 120, 2000
WHOLE = re.compile(r"[+-]?(0|[1-9][0-9]{0,14})")
DECIMAL = re.compile(
    r"[+-]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,4})?|[+-]?inf|nan"
)
"""Patterns of numbers. Digits with leading zeros, such as 007, count as text."""


class LeftOut(Exception):
    """Raised for a file that is not shown; the message is the reason."""


@dataclass(frozen=True)
class ForeignTable:
    """A table of formatted cells."""

    columns: list[str]
    rows: list[list[str]]


def read_bytes(path: Path) -> bytes:
    """Read a regular file of at most MOST_BYTES. Raises LeftOut for any other file."""
    try:
        if not path.is_file():  # reading a pipe would block
            raise LeftOut("not a regular file")
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise LeftOut(f"{size:,} bytes; at most {MOST_BYTES:,} are read")
        with path.open("rb") as file:
            return file.read(MOST_BYTES)
    except OSError as error:
        raise LeftOut(f"can't be read ({error.strerror or type(error).__name__})") from None


def read_table(path: Path) -> ForeignTable:
    """Read a CSV file with column names in its first line. Raises LeftOut for any other file."""
    try:
        text = read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise LeftOut(f"not UTF-8 text: byte {error.start}") from None
    if "\0" in text:
        raise LeftOut("not text: it has zero bytes")
    rows: list[list[str]] = []
    count = 0
    try:
        for row in csv.reader(io.StringIO(text, newline="")):
            if row:
                count += 1
                if count <= MOST_ROWS + 1:
                    rows.append(row)
    except csv.Error as error:
        raise LeftOut(f"not CSV: {error}") from None
    if not rows:
        raise LeftOut("an empty file")
    if count > MOST_ROWS + 1:
        raise LeftOut(f"a table of {count - 1:,} rows; at most {MOST_ROWS} are shown")
    wide = max(map(len, rows))
    if wide > MOST_COLUMNS:
        raise LeftOut(f"a table of {wide:,} columns; at most {MOST_COLUMNS} are shown")
    whole = [row + [""] * (wide - len(row)) for row in rows]
    names, cells = whole[0], whole[1:]
    columns = [_column([row[place] for row in cells]) for place in range(wide)]
    shown = [list(row) for row in zip(*columns, strict=True)]
    return ForeignTable([shortened(name, LONGEST_CELL) for name in names], shown)


def _column(cells: Sequence[str]) -> list[str]:
    """Format a column of numbers with the same number of digits; only shorten any other column."""
    stripped = [cell.strip() for cell in cells]
    there = [cell for cell in stripped if cell]
    if all(WHOLE.fullmatch(cell) for cell in there):
        return even([int(cell) if cell else None for cell in stripped])
    if all(DECIMAL.fullmatch(cell) and len(cell) < LONGEST_CELL for cell in there):
        numbers = [float(cell) if cell else None for cell in stripped]
        # A number too large for a float would be shown as infinite: keep such a column as text.
        if all(c[-1:] in "fn" or math.isfinite(float(c)) for c in there):
            return even(numbers)
    return [shortened(cell, LONGEST_CELL) for cell in cells]


def read_picture(path: Path) -> tuple[bytes, str]:
    """Read a PNG file; return its bytes and the caption in its metadata, or else its file name.
    Raises LeftOut for any other file."""
    from PIL import Image

    content = read_bytes(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
                caption = image.info.get(CAPTION)
                image.verify()
    except Exception:  # other files make the reader raise errors of any kind
        raise LeftOut("not a PNG, or a damaged one") from None
    if not isinstance(caption, str) or not caption.strip():
        caption = path.stem.replace("-", " ")
    return content, printable(caption)[:LONGEST_CAPTION]
