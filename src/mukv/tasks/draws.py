"""Random numbers for many samples at once; the numbers of a row depend only on its key.

A row's key is a hash of (seed, split, i), and its numbers are those of SplitMix64, indexed by a
counter. A sample is therefore the same in any order and in any batch.
"""

from __future__ import annotations

from zlib import crc32

import numpy as np
from jaxtyping import Float, Int

from mukv.core.mixing import GOLDEN, mixed, permuted


class Draws:
    """Random numbers for the rows of a batch; each call continues where the last one ended.

    keys: uint64 [row]
    """

    def __init__(self, keys: np.ndarray):
        self.keys, self.used = keys, 0

    @classmethod
    def of(cls, seed: int, split: int, indices: Int[np.ndarray, " row"]) -> Draws:
        """Return the numbers of the samples `indices` of a split."""
        base = mixed(mixed(np.uint64(seed)) ^ np.uint64(split))
        return cls(mixed(base ^ indices.astype(np.uint64)))

    @property
    def rows(self) -> int:
        return len(self.keys)

    def stream(self, name: str) -> Draws:
        """Return an independent generator for the same rows, which does not depend on earlier
        draws."""
        return Draws(mixed(self.keys ^ np.uint64(crc32(name.encode()))))

    def bits(self, count: int) -> np.ndarray:
        """Draw uint64 [row, count]."""
        counter = np.arange(self.used, self.used + count, dtype=np.uint64) * GOLDEN
        self.used += count
        return mixed(self.keys[:, None] + counter)

    def integers(self, below: int | np.ndarray, *shape: int) -> Int[np.ndarray, "row ..."]:
        """Draw integers with 0 <= number < below: int64 [row, *shape]; `below` broadcasts."""
        high = self.bits(int(np.prod(shape, dtype=int))).reshape(self.rows, *shape)
        scaled = (high >> np.uint64(32)) * np.asarray(below).astype(np.uint64)
        return (scaled >> np.uint64(32)).astype(np.int64)

    def small(self, below: int, count: int) -> Int[np.ndarray, "row count"]:
        """Draw as `integers` with below < 256, int32 and four numbers per draw: for filler."""
        words = self.bits(-(-count // 4)).view(np.uint16)[:, :count].astype(np.int32)
        return words * below >> 16

    def uniform(self, *shape: int) -> Float[np.ndarray, "row ..."]:
        """Draw uniform numbers in [0, 1)."""
        return self.integers(1 << 32, *shape) / 2.0**32

    def order(self, count: int) -> Int[np.ndarray, "row count"]:
        """Draw permutations of 0 .. count - 1."""
        return np.argsort(self.bits(count), axis=1)

    def distinct(self, count: int, below: int) -> Int[np.ndarray, "row count"]:
        """Draw distinct integers, 0 <= number < below, in random order."""
        if below <= 2 * count:
            return self.order(below)[:, :count]
        epoch = np.repeat(self.bits(1)[:, 0], count)
        place = np.tile(np.arange(count), self.rows)
        return permuted(place, epoch, below, seed=0).reshape(self.rows, count)
