"""Measurements that are stored as they come, so that the same command continues after a stop.

Each line of the file is a JSON object with a key and the measurement. The key is a hash of all that
the measurement depends on: the model's weights and settings, the tokens, the policy.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput, telling_disk_errors
from mukv.storage.files import require_regular_file
from mukv.storage.json_text import to_json

NAME = "finished.jsonl"
MOST_BYTES = 1 << 30
"""A larger file is not read."""


def key_of(*facts: Any) -> str:
    """Return a hash of facts. Arrays count with shape, type and content; other objects with their
    `repr`, which for a dataclass has the values of all fields.
    """
    total = hashlib.sha256()
    for fact in facts:
        if hasattr(fact, "tobytes"):
            total.update(f"{fact.shape} {fact.dtype} ".encode() + fact.tobytes())
        else:
            total.update(repr(fact).encode())
        total.update(b"\0")
    return total.hexdigest()


class Finished:
    """Measurements by key, in a file."""

    def __init__(self, folder: Path, again: bool = False):
        """again: forget the measurements of earlier commands"""
        self.path = folder / NAME
        if again and self.path.is_file():
            with telling_disk_errors(self.path):
                self.path.unlink()
        self.known = _read(self.path)

    def get(self, key: str) -> dict[str, Any] | None:
        """Return a measurement; None if it has not been made."""
        return self.known.get(key)

    def add(self, key: str, measured: dict[str, Any]) -> None:
        """Store a measurement durably."""
        self.known[key] = measured
        line = to_json({"key": key, "measured": measured}) + "\n"
        with telling_disk_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                # What a killed process had begun to write is no line, and must not join this one.
                if file.tell() and not _ends_with_line(self.path):
                    file.write(b"\n")
                file.write(line.encode())
                file.flush()
                os.fsync(file.fileno())


def _ends_with_line(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() == b"\n"


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """Return the complete lines of a file; none if there is no such file."""
    known: dict[str, dict[str, Any]] = {}
    if not path.exists():
        return known
    if (size := require_regular_file(path).stat().st_size) > MOST_BYTES:
        raise BadInput(str(path), f"{size:,} bytes", "a file of this command; remove it")
    with telling_disk_errors(path), path.open("rb") as file:
        for line in file:
            try:
                found = json.loads(line)
                key, measured = found["key"], found["measured"]
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if isinstance(key, str) and isinstance(measured, dict):
                known[key] = measured
    return known
