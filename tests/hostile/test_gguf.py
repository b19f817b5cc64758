"""Truncated, changed and invented GGUF files are read, or refused in one line."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf")

from mukv.hub import checkpoint
from tests.hostile.harness import check_all
from tests.hub.ggufs import write_gguf
from tests.parity.models import TINY, build


def changed(content: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield truncated files, files with changed bytes, and files with impossible lengths."""
    draw = random.Random(0)
    for cut in [*range(0, 64, 3), *(draw.randrange(len(content)) for _ in range(60))]:
        yield f"cut at {cut}", content[:cut]
    for _ in range(150):
        place = draw.randrange(min(4096, len(content)))
        byte = bytes([draw.randrange(256)])
        yield f"byte {place} is {byte!r}", content[:place] + byte + content[place + 1 :]
    for place in (8, 16, 24):
        for length in (2**31, 2**40, 2**63, 2**64 - 1):
            packed = struct.pack("<Q", length)
            yield f"length {length} at {place}", content[:place] + packed + content[place + 8 :]


def test_changed_files(tmp_path: Path, record_property, monkeypatch):
    monkeypatch.setenv("MUKV_CACHE", str(tmp_path / "cache"))
    model = build("Llama", TINY | {"num_hidden_layers": 1})
    content = write_gguf(tmp_path / "model.gguf", "llama", model).read_bytes()

    def opens(number: int, data: bytes) -> Callable[[], Any]:
        path = tmp_path / f"{number}.gguf"
        path.write_bytes(data)
        return lambda: checkpoint.find(path)

    inputs = ((label, opens(n, data)) for n, (label, data) in enumerate(changed(content)))
    counts = check_all("GGUF files", inputs, record_property)
    assert counts["refused"] > 80
