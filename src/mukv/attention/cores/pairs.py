"""Chunks of queries, blocks of keys, and the pairs of them that contain a visible key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mukv.attention.cores.base import Part
from mukv.core.typing import Array

NOBODY = -(1 << 31)
"""Document of a key that no query sees; padding may have any other number."""


def chunk_size(length: int) -> int:
    """Return the maximum size of a chunk or block: an eighth of the length, from 64 to 256."""
    return min(max(length // 8, 64), 256)


@dataclass(frozen=True)
class Division:
    """An axis of `length`, divided into `number` pieces of `size`, with padding at the end."""

    length: int
    size: int
    number: int

    @classmethod
    def of(cls, length: int, size: int | None) -> Division:
        """Divide an axis of this length.

        size: size of a piece; None for the sizes up to `chunk_size` that need the least padding
        """
        if size is None:
            number = -(-length // chunk_size(length))
            return cls(length, -(-length // number), number)
        size = min(size, length)
        return cls(length, size, -(-length // size))

    @property
    def padding(self) -> int:
        """Number of padded elements."""
        return self.number * self.size - self.length

    def padded(self, array: Any, axis: int) -> Any:
        """Pad an axis at the end with zeros or false.

        The operation is emitted even if nothing is added, so that the number of operations in the
        program does not depend on the length.
        """
        if array is None:
            return None
        widths = [(0, self.padding if n == axis else 0, 0) for n in range(array.ndim)]
        return jax.lax.pad(array, jnp.zeros((), array.dtype), widths)

    def take(self, array: Any, index: Array, axis: int) -> Any:
        """Return piece number `index` along an axis."""
        if array is None:
            return None
        return jax.lax.dynamic_slice_in_dim(array, index * self.size, self.size, axis)

    def put(self, array: Array, piece: Array, index: Array, axis: int) -> Array:
        """Return the array with piece number `index` replaced."""
        return jax.lax.dynamic_update_slice_in_dim(array, piece, index * self.size, axis)

    def add(self, array: Array, piece: Array, index: Array, axis: int) -> Array:
        """Return the array with `piece` added to piece number `index`."""
        return self.put(array, self.take(array, index, axis) + piece, index, axis)


class Places(NamedTuple):
    """Padded positions, validity and documents of a bag's entries, and documents of the queries.

    position, valid, segment, until: of the entries, [batch #kv_heads key]
    asking: number of the document of each query, [batch query]

    A field is None if it restricts nothing.
    """

    position: Any
    valid: Any
    segment: Any
    asking: Any
    until: Any = None

    @classmethod
    def of(cls, part: Part, rows: Division, keys: Division) -> Places:
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
            keys.padded(entries.until, 2),
        )


def documents(places: Places, position: Array) -> tuple[Array, Array]:
    """Return the document of each query and of each key [batch token]; NOBODY for keys that are
    not valid. position: padded positions of the queries"""
    if places.segment is None:
        own, keys = jnp.zeros_like(position), jnp.zeros_like(places.position[:, 0])
    else:
        own, keys = places.asking, places.segment[:, 0]
    if places.valid is not None:
        keys = jnp.where(places.valid[:, 0], keys, NOBODY)
    return own.astype(jnp.int32), keys.astype(jnp.int32)


def aligned_pairs(rows: Division, keys: Division, window: int | None) -> tuple[np.ndarray, int]:
    """List the pairs of a chunk and a block with a visible key, for entries that the queries wrote.

    Returns their indices [pair 2], chunk by chunk with blocks from right to left, and their number.
    """
    i, j = np.indices((rows.number, keys.number))
    seen = j * keys.size < (i + 1) * rows.size
    if window is not None:
        seen &= (j + 1) * keys.size - 1 > i * rows.size - window
    i, j = np.nonzero(seen[:, ::-1])
    return np.stack([i, keys.number - 1 - j], axis=1).astype(np.int32), len(i)


def pairs(
    rows: Division, keys: Division, window: int | None, position: Array, places: Places
) -> tuple[Array, Array]:
    """List the pairs of a chunk and a block with a visible key, for any entries.

    They are found from positions, validity and documents. Returns [pair 2] as `aligned_pairs` does,
    of which only the first ones are valid, and the number of these.
    """
    seen = jnp.any(reachable(rows, keys, window, position, places), axis=(0, 1))
    flat = jnp.nonzero(seen[:, ::-1].reshape(-1), size=seen.size, fill_value=0)[0]
    i, j = flat // keys.number, keys.number - 1 - flat % keys.number
    return jnp.stack([i, j], axis=1), jnp.sum(seen)


def reachable(
    rows: Division, keys: Division, window: int | None, position: Array, places: Places
) -> Array:
    """Return whether some query of each chunk may see some key of each block.

    position: padded positions of the queries [batch query]

    The result is [batch #kv_heads chunk block].

    It compares extreme values, so it may be true for a pair without a visible key, but is never
    false for one with.
    """
    asks = position.reshape(len(position), 1, rows.number, 1, rows.size)
    stands = places.position.reshape(*places.position.shape[:2], 1, keys.number, keys.size)
    nearest = furthest = stands
    if places.valid is not None:
        # Heads that share a pool of entries differ in which are valid, not in the positions.
        valid = places.valid.reshape(*places.valid.shape[:2], *stands.shape[2:])
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
    return seen
