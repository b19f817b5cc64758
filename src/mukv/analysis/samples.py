"""Choose the windows of texts that are measured: all of one length, evenly spaced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mukv.analysis.capture import CapturedRows
from mukv.core.errors import BadInput
from mukv.data.batches import Batches
from mukv.data.tokens import TokenFile


def windows(name: str, texts: Sequence[np.ndarray], length: int, samples: int) -> CapturedRows:
    """Choose at most `samples` windows of `length` tokens, evenly spaced over all texts.

    name: name of the texts, for errors
    texts: token ids [token]

    Each window has positions from 0, like the beginning of a document. Raises BadInput if every
    text is shorter than a window.
    """
    starts = [
        (number, start)
        for number, text in enumerate(texts)
        for start in range(0, len(text) - length + 1, length)
    ]
    if not starts:
        longest = max(map(len, texts))
        raise BadInput("--length", length, f"at most {longest}: {name} has no more tokens")
    chosen = np.unique(np.linspace(0, len(starts) - 1, min(samples, len(starts))).astype(int))
    rows = [texts[starts[i][0]][starts[i][1] : starts[i][1] + length] for i in chosen]
    tokens = np.stack(rows).astype(np.int32)
    position = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return CapturedRows(tokens, position, np.ones_like(tokens))


def held_out(corpus: TokenFile, length: int, samples: int) -> CapturedRows:
    """Return windows of a token file's validation split, packed as in training: a token attends
    only to its own document."""
    batches = Batches(corpus, seed=0, batch=samples, length=length, split="validation")
    batch = next(iter(batches.once(limit=1)))
    real = batch.segment.any(axis=1)
    return CapturedRows(batch.tokens[real], batch.position[real], batch.segment[real])


def from_training(corpus: TokenFile, length: int, samples: int) -> CapturedRows:
    """Return windows of the training split in the order of training; windows with padding are left
    out."""
    batches = Batches(corpus, seed=0, batch=samples, length=length)
    batch = batches.at(0)
    full = batch.segment.all(axis=1)
    return CapturedRows(batch.tokens[full], batch.position[full], batch.segment[full])


def even(rows: CapturedRows, most: int) -> Iterator[CapturedRows]:
    """Yield batches of equal size: the largest divisor of the number of rows that is at most
    `most`."""
    count = len(rows.tokens)
    size = max(n for n in range(1, min(most, count) + 1) if count % n == 0)
    for start in range(0, count, size):
        yield CapturedRows(*(array[start : start + size] for array in rows))


def halves(rows: CapturedRows) -> tuple[CapturedRows, CapturedRows]:
    """Split windows into those with even and odd index. Raises BadInput for a single window."""
    if len(rows.tokens) < 2:
        raise BadInput("--text", f"{len(rows.tokens)} window", "2 or more: half of them calibrate")
    first, second = (CapturedRows(*(array[start::2] for array in rows)) for start in (0, 1))
    return first, second


def joined(parts: Iterable[CapturedRows]) -> CapturedRows:
    """Concatenate the windows of several texts."""
    return CapturedRows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def batched(rows: CapturedRows, size: int) -> Iterator[CapturedRows]:
    """Yield batches of one shape; the last is completed with rows of padding (segment 0)."""
    size = min(size, len(rows.tokens))
    for start in range(0, len(rows.tokens), size):
        part = CapturedRows(*(array[start : start + size] for array in rows))
        missing = size - len(part.tokens)
        yield CapturedRows(*(np.pad(array, ((0, missing), (0, 0))) for array in part))
