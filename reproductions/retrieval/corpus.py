"""Make documents with facts to be recalled: lines of a text, and between them lines such as
`@K:qzv`.

A fact occurs once, where it can't be predicted, and again later, where it can. After the cue `@K:q`
a model must answer `zv`. Documents are ordinary text, so that training, evaluation and compression
need no special code.
"""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path

import numpy as np

MARK = "@"
VALUE = 3
CUE, ANSWER = 4, 2
"""Bytes of the cue and of the answer of a line."""


@dataclass(frozen=True)
class Puzzle:
    """A text, and those of its lines that are facts."""

    text: str
    facts: tuple[str, ...]


def fact(key: str, value: str) -> str:
    return f"{MARK}{key}:{value}\n"


def drawn_facts(random: np.random.Generator, count: int) -> dict[str, str]:
    """Draw facts with different keys."""
    keys = random.choice(list(string.ascii_uppercase), count, replace=False)
    letters = random.choice(list(string.ascii_lowercase), (count, VALUE))
    return {str(key): "".join(row) for key, row in zip(keys, letters, strict=True)}


def lines_of(text: bytes, random: np.random.Generator, size: int) -> list[str]:
    """Return whole lines of a text from a random place on, about `size` bytes."""
    start = int(random.integers(0, max(len(text) - 2 * size, 1)))
    piece = text[start : start + size + 80].decode("utf-8", "ignore").replace(MARK, "#")
    lines, taken = [], 0
    for line in piece.splitlines(keepends=True)[1:]:
        if taken >= size:
            break
        lines.append(line.rstrip("\n")[:100] + "\n")
        taken += len(lines[-1].encode())
    return lines


def document(text: bytes, random: np.random.Generator, length: int) -> str:
    """Make a training document: facts, each repeated one to three times after it."""
    dense = random.random() < 0.4
    each = len(fact("K", "v" * VALUE))
    asked = int(random.integers(1, 4))
    count = int(random.integers(2, 13))
    if dense:
        count, asked = min(26, max(2, length // (each * (asked + 1)))), asked
    room = 0 if dense else max(0, length - count * each * (asked + 1))
    pieces = lines_of(text, random, room) if room else []
    placed = [(float(place), line) for place, line in enumerate(pieces)]
    end = max(len(pieces), 1)
    for key, value in drawn_facts(random, count).items():
        first = random.uniform(-1, end)
        placed.append((first, fact(key, value)))
        placed += [(random.uniform(first, end), fact(key, value)) for _ in range(asked)]
    return "".join(line for _, line in sorted(placed, key=lambda pair: pair[0]))


def puzzle(text: bytes, random: np.random.Generator, length: int, facts: int) -> Puzzle:
    """Make a test text of about `length` bytes with facts in it, none repeated yet."""
    keys = random.choice(list(string.ascii_uppercase), facts, replace=False)
    # Cues with distinct letters, so that each has one answer.
    firsts = random.choice(list(string.ascii_lowercase), facts, replace=False)
    rest = random.choice(list(string.ascii_lowercase), (facts, VALUE - 1))
    lines = [
        fact(key, first + "".join(more))
        for key, first, more in zip(keys, firsts, rest, strict=True)
    ]
    between = lines_of(text, random, length - sum(map(len, lines)) - 80)
    for line in lines:
        between.insert(int(random.integers(0, len(between) + 1)), line)
    whole = "".join(between)
    assert len(whole.encode()) <= length
    return Puzzle(whole, tuple(lines))


def write_documents(text: bytes, path: Path, count: int, length: int, seed: int = 0) -> None:
    """Write a JSONL file of documents; an existing one is kept."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    lines = [json.dumps({"text": document(text, random, length)}) for _ in range(count)]
    partial = path.with_suffix(".partial")
    partial.write_text("\n".join(lines) + "\n")
    partial.replace(path)
