"""Chunks of queries, blocks of keys, and which of their pairs hold something to be seen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mukv.attention.cores.base import Part
from mukv.core.typing import Array


def chunk_size(length: int) -> int:
    """Queries, and keys, that are taken at once: an eighth of them, 64 to 256."""
    return min(max(length // 8, 64), 256)


@dataclass(frozen=True)
class Cut:
    """An axis of `length`, padded to `number` pieces of `size`."""

    length: int
    size: int
    number: int

    @classmethod
    def of(cls, length: int, size: int | None) -> Cut:
        """size: of a piece; None for pieces of `chunk_size` at most, which pad the least."""
        if size is None:
            number = -(-length // chunk_size(length))
            return cls(length, -(-length // number), number)
        size = min(size, length)
        return cls(length, size, -(-length // size))

    @property
    def padding(self) -> int:
        return self.number * self.size - self.length

    def padded(self, array: Any, axis: int) -> Any:
        """With zeros, or false, behind. It is an operation even where nothing is added, so that the
        size of a program does not depend on what divides the length."""
        if array is None:
            return None
        widths = [(0, self.padding if n == axis else 0, 0) for n in range(array.ndim)]
        return jax.lax.pad(array, jnp.zeros((), array.dtype), widths)

    def take(self, array: Any, index: Array, axis: int) -> Any:
        """Piece number `index`."""
        if array is None:
            return None
        return jax.lax.dynamic_slice_in_dim(array, index * self.size, self.size, axis)

    def put(self, array: Array, piece: Array, index: Array, axis: int) -> Array:
        """The array with another piece number `index`."""
        return jax.lax.dynamic_update_slice_in_dim(array, piece, index * self.size, axis)

    def add(self, array: Array, piece: Array, index: Array, axis: int) -> Array:
        """The array with something added to piece number `index`."""
        return self.put(array, self.take(array, index, axis) + piece, index, axis)


class Places(NamedTuple):
    """Where the entries of a bag stand: [batch #kv_heads key], and `asking` the documents of the
    queries, [batch query]; None where there is nothing to tell."""

    position: Any
    valid: Any
    segment: Any
    asking: Any

    @classmethod
    def of(cls, part: Part, rows: Cut, keys: Cut) -> Places:
        entries, asking = part.entries, part.mask.segment
        valid, segment = entries.valid, entries.segment
        if valid is None and (keys.padding or not part.mask.aligned):
            valid = jnp.ones(entries.position.shape, bool)
        if segment is None or asking is None:
            segment = asking = None
        return cls(
            keys.padded(entries.position, 2),
            keys.padded(valid, 2),
            keys.padded(segment, 2),
            rows.padded(asking, 1),
        )


def aligned_pairs(rows: Cut, keys: Cut, window: int | None) -> tuple[np.ndarray, int]:
    """Chunk and block of each pair in which a query may see a key, [pair 2], and their number, for
    entries that the queries wrote themselves. Chunk by chunk, blocks right to left."""
    i, j = np.indices((rows.number, keys.number))
    seen = j * keys.size < (i + 1) * rows.size
    if window is not None:
        seen &= (j + 1) * keys.size - 1 > i * rows.size - window
    i, j = np.nonzero(seen[:, ::-1])
    return np.stack([i, keys.number - 1 - j], axis=1).astype(np.int32), len(i)


def pairs(
    rows: Cut, keys: Cut, window: int | None, position: Array, places: Places
) -> tuple[Array, Array]:
    """The same for any entries, found from positions and documents: [pair 2], of which only the
    first ones count, and how many these are."""
    seen = _reachable(rows, keys, window, position, places)
    flat = jnp.nonzero(seen[:, ::-1].reshape(-1), size=seen.size, fill_value=0)[0]
    i, j = flat // keys.number, keys.number - 1 - flat % keys.number
    return jnp.stack([i, j], axis=1), jnp.sum(seen)


def _reachable(rows: Cut, keys: Cut, window: int | None, position: Array, places: Places) -> Array:
    """Whether a query of each chunk may see a key of each block, in any row: [chunk block]; true
    wherever one does."""
    asks = position.reshape(len(position), 1, rows.number, 1, rows.size)
    stands = places.position.reshape(*places.position.shape[:2], 1, keys.number, keys.size)
    nearest = furthest = stands
    if places.valid is not None:
        valid = places.valid.reshape(stands.shape)
        nearest = jnp.where(valid, stands, jnp.iinfo(stands.dtype).max)
        furthest = jnp.where(valid, stands, -1)
    seen = asks.max(-1) >= nearest.min(-1)
    if window is not None:
        seen &= asks.min(-1) - furthest.max(-1) < window
    if places.segment is not None:
        asking = places.asking.reshape(asks.shape)
        segment = places.segment.reshape(*places.segment.shape[:2], *stands.shape[2:])
        seen &= asking.max(-1) >= segment.min(-1)
        seen &= asking.min(-1) <= segment.max(-1)
    return jnp.any(seen, axis=(0, 1))
