"""Compute and compare the checksum of a safetensors file, which is in the file's metadata.

`"checksum": "crc32:0123abcd"` is the CRC-32 of all bytes of the file, header included, with these
eight digits replaced by zeros. A file without a checksum was written by another program or an older
version.
"""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import BinaryIO

from mukv.core.errors import BadInput

KEY, PREFIX = "checksum", "crc32:"
EMPTY = f"{PREFIX}{0:08x}"
BLOCK = 1 << 20
HEADER_BYTES = 100_000_000
"""Longest header that safetensors itself reads."""


def sealed(value: int) -> str:
    """Format a checksum as it is written in the metadata."""
    return f"{PREFIX}{value:08x}"


def require_whole(path: Path) -> None:
    """Raise BadInput if a safetensors file does not match its checksum, or does not exist.

    A file without a checksum passes, and so does a file without a readable header, which causes an
    error when it is opened. The whole file is read, which takes 0.3 s for 135 million float32
    weights on two cores.
    """
    if not path.is_file():
        raise BadInput(str(path), "no such file", "a file with saved weights")
    try:
        with path.open("rb") as file:
            head, stated = _header(file)
            if stated is None:
                return
            actual = sealed(_rest(file, zlib.crc32(head)))
    except OSError as error:
        raise BadInput(str(path), error.strerror, "a file that can be read") from None
    if actual != stated:
        allowed = f"its checksum is {stated}, its content's {actual}: it was cut short or changed"
        raise BadInput(str(path), "a damaged file", allowed)


def _header(file: BinaryIO) -> tuple[bytes, str | None]:
    """Return the bytes before the tensors, with the checksum replaced by zeros, and the checksum
    (None without checksum).
    """
    size = file.read(8)
    length = int.from_bytes(size, "little")
    if len(size) < 8 or length > HEADER_BYTES:
        return b"", None
    text = file.read(length)
    try:
        metadata = json.loads(text).get("__metadata__", {})
        # Found by its key or by its form, so that one flipped bit can't hide it.
        matches = [
            value
            for key, value in metadata.items()
            if key == KEY or re.fullmatch(PREFIX + "[0-9a-f]{8}", value)
        ]
    except (ValueError, AttributeError, TypeError, RecursionError):
        return b"", None
    if not matches:
        return b"", None
    stated = str(matches[0])
    return size + text.replace(stated.encode(), EMPTY.encode(), 1), stated


def _rest(file: BinaryIO, value: int) -> int:
    """Continue the checksum to the end of the file."""
    block = memoryview(bytearray(BLOCK))
    while count := file.readinto(block):  # pyright: ignore[reportAttributeAccessIssue]
        value = zlib.crc32(block[:count], value)
    return value
