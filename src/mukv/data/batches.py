"""Batches as a pure function of (seed, step, row), so that resuming needs only the step.

A stream is divided into windows of `length` + 1 tokens that overlap by one, so that every token but
the first is predicted once per epoch. The order of windows in an epoch is a keyed permutation,
which is computed, not stored.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from types import TracebackType
from typing import Generic, Literal, NamedTuple, Self, TypeVar

import numpy as np
from jaxtyping import Float, Int

from mukv.core.errors import BadInput, unknown_name
from mukv.core.mixing import permuted
from mukv.data.tokens import SPLITS, Stream, TokenFile, check_ids

PACKINGS = ("packed", "contiguous")
T = TypeVar("T")


class Batch(NamedTuple):
    """Rows of tokens with the target of each token.

    tokens: ids, int32 [batch, token]
    targets: the id after each token, int32 [batch, token]
    position: position in the document, from 0 at the document's first token in this window
    segment: number of the document in the row, from 1; 0 is padding
    weight: weight of the target in the loss: 0 where the target is padding, the first token of a
        document, or a token of a conversation that is not learned; else 1
    """

    tokens: Int[np.ndarray, "batch token"]
    targets: Int[np.ndarray, "batch token"]
    position: Int[np.ndarray, "batch token"]
    segment: Int[np.ndarray, "batch token"]
    weight: Float[np.ndarray, "batch token"]


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of one split of a token file.

    Raises BadInput for unknown splits and packings, for sizes below 1, and for a split of a single
    token.

    seed: key of the permutation of windows
    batch: rows over all hosts
    length: tokens per row
    packing: "packed" gives each document its own segment and positions; "contiguous" makes a row
        one segment
    """

    tokens: TokenFile
    seed: int
    batch: int
    length: int
    split: Literal["train", "validation"] = "train"
    packing: Literal["packed", "contiguous"] = "packed"

    def __post_init__(self) -> None:
        for name, names in (("split", SPLITS), ("packing", PACKINGS)):
            if getattr(self, name) not in names:
                raise unknown_name(name, getattr(self, name), names)
        for name in ("batch", "length"):
            if getattr(self, name) < 1:
                raise BadInput(name, getattr(self, name), "at least 1")
        if len(self.stream.tokens) < 2:
            raise BadInput(str(self.tokens.path), f"{self.split} of 1 token", "at least 2")

    @cached_property
    def stream(self) -> Stream:
        """The tokens of the split."""
        return self.tokens.split(self.split)

    @property
    def windows(self) -> int:
        """Windows in one epoch; the last may be partly padding."""
        return -(-(len(self.stream.tokens) - 1) // self.length)

    def at(self, step: int, host: int = 0, hosts: int = 1) -> Batch:
        """Return this host's rows of the training batch of a step. All hosts' rows together do not
        depend on the number of hosts.
        """
        return self.training_rows(rows_of(self.batch, step, host, hosts))

    def training_rows(self, numbers: Int[np.ndarray, " row"]) -> Batch:
        """Return the rows of training with these numbers, counted from its beginning."""
        epoch, place = np.divmod(numbers, self.windows)
        return self._read(permuted(place, epoch, self.windows, self.seed))

    def once(self, limit: int | None = None, host: int = 0, hosts: int = 1) -> Iterator[Batch]:
        """Yield every window once, in order; the last batch is filled with rows of weight 0.

        limit: largest number of batches; their windows are spread evenly over the stream
        """
        steps = -(-self.windows // self.batch)
        rows, total = self.windows, self.windows
        if limit is not None and limit < steps:
            steps, rows = limit, limit * self.batch
        for step in range(steps):
            row = rows_of(self.batch, step, host, hosts)
            yield self._read(np.where(row < rows, row * total // rows, total))

    def _read(self, windows: Int[np.ndarray, " row"]) -> Batch:
        stream, length = self.stream, self.length
        count = len(stream.tokens)
        first = windows * length
        rows = np.zeros((len(windows), length + 1), stream.tokens.dtype)
        begins = np.zeros(rows.shape, bool)
        wanted = None if stream.learned is None else np.zeros(rows.shape, bool)
        edges = np.searchsorted(stream.starts, np.stack([first, first + length + 1]))
        for row, start in enumerate(first.tolist()):
            piece = stream.tokens[start : start + length + 1]
            rows[row, : len(piece)] = piece
            if wanted is not None and stream.learned is not None:
                wanted[row, : len(piece)] = stream.learned[start : start + length + 1]
            begins[row, stream.starts[edges[0, row] : edges[1, row]] - start] = True
        check_ids(self.tokens, rows)
        # int32 throughout, because these passes over the whole batch dominate its cost.
        place = np.arange(length + 1, dtype=np.int32)
        real = place < (count - first)[:, None]
        learned = (real & ~begins if wanted is None else real & ~begins & wanted)[:, 1:]
        if self.packing == "contiguous":
            begins[:] = False
        begins[:, 0] = True
        latest = np.maximum.accumulate(begins[:, :-1] * place[:-1], axis=1)
        segment = np.cumsum(begins[:, :-1], axis=1, dtype=np.int32)
        return Batch(
            tokens=rows[:, :-1].astype(np.int32),
            targets=rows[:, 1:].astype(np.int32),
            position=place[:-1] - latest,
            segment=segment * real[:, :-1],
            weight=learned.astype(np.float32),
        )


def rows_of(batch: int, step: int, host: int, hosts: int) -> Int[np.ndarray, " row"]:
    """Return the numbers of this host's rows of a step, counted from the beginning of training.

    batch: rows per step over all hosts. Raises BadInput if the hosts can't share them equally.
    """
    if batch % hosts:
        raise BadInput("batch", batch, f"a multiple of the number of hosts ({hosts})")
    share = batch // hosts
    return step * batch + host * share + np.arange(share)


class Prefetch(Generic[T]):
    """Make the next batches in a thread while the device works on the current one.

    Iterating yields `make(step)` for each step, in order. An exception of `make` is raised where
    its batch would have been yielded.

    make: function of a step
    steps: the steps, in order
    depth: batches made ahead

    `wait_seconds` is the time for which the caller has waited for batches.
    """

    def __init__(self, make: Callable[[int], T], steps: Iterable[int], depth: int = 2):
        self.make, self.steps, self.depth = make, steps, depth
        self.wait_seconds = 0.0
        self.pool = ThreadPoolExecutor(1, "prefetch")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.pool.shutdown(cancel_futures=True)

    def __iter__(self) -> Iterator[T]:
        futures = (self.pool.submit(self.make, step) for step in self.steps)
        pending: deque[Future[T]] = deque(islice(futures, self.depth))
        while pending:
            began = time.monotonic()
            batch = pending.popleft().result()
            self.wait_seconds += time.monotonic() - began
            pending.extend(islice(futures, 1))
            yield batch
