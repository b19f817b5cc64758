"""Which pieces of which texts are looked at: windows of one length, spread evenly."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from mukv.analysis.capture import CapturedRows
from mukv.core.errors import BadInput
from mukv.data.batches import Batches
from mukv.data.tokens import TokenFile


def windows(name: str, texts: Sequence[np.ndarray], length: int, samples: int) -> CapturedRows:
    """At most `samples` windows of token ids, each read as the beginning of a document.

    Raises BadInput if no text is as long as a window.
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
    """Windows of a token file's validation stream; documents in them are apart, as in training."""
    batches = Batches(corpus, seed=0, batch=samples, length=length, split="validation")
    batch = next(iter(batches.once(limit=1)))
    real = batch.segment.any(axis=1)
    return CapturedRows(batch.tokens[real], batch.position[real], batch.segment[real])


def from_training(corpus: TokenFile, length: int, samples: int) -> CapturedRows:
    """Windows of the training stream, in the order of training; all of them full."""
    batches = Batches(corpus, seed=0, batch=samples, length=length)
    batch = batches.at(0)
    full = batch.segment.all(axis=1)
    return CapturedRows(batch.tokens[full], batch.position[full], batch.segment[full])


def even(rows: CapturedRows, most: int) -> Iterator[CapturedRows]:
    """Batches of one size, as large as divides the rows."""
    count = len(rows.tokens)
    size = max(n for n in range(1, min(most, count) + 1) if count % n == 0)
    for start in range(0, count, size):
        yield CapturedRows(*(array[start : start + size] for array in rows))


def halves(rows: CapturedRows) -> tuple[CapturedRows, CapturedRows]:
    """Every second window, and the others."""
    if len(rows.tokens) < 2:
        raise BadInput("--text", f"{len(rows.tokens)} window", "two: to calibrate, and to judge by")
    first, second = (CapturedRows(*(array[start::2] for array in rows)) for start in (0, 1))
    return first, second


def joined(parts: Iterable[CapturedRows]) -> CapturedRows:
    """Windows of several texts as one."""
    return CapturedRows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def batched(rows: CapturedRows, size: int) -> Iterator[CapturedRows]:
    """Batches of one shape: the last is filled up with rows that are no document."""
    size = min(size, len(rows.tokens))
    for start in range(0, len(rows.tokens), size):
        part = CapturedRows(*(array[start : start + size] for array in rows))
        missing = size - len(part.tokens)
        yield CapturedRows(*(np.pad(array, ((0, missing), (0, 0))) for array in part))
