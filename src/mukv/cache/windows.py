"""Cut the entries of each head into windows of equal size, in the order of their positions."""

from __future__ import annotations

from dataclasses import dataclass

import jax.numpy as jnp

from mukv.cache.seen import Seen
from mukv.core.typing import Array, Float, Int


@dataclass(frozen=True)
class Windows:
    """Consecutive windows of `size` entries, after the first `skipped` entries of each head.

    rank: number of entries of the same head before an entry, less `skipped`; meaningless for
        empty slots
    count: entries of each head, less `skipped`; at least 0
    order: indices of the entries, empty slots last
    """

    rank: Int[Array, "batch heads key"]
    count: Int[Array, "batch heads 1"]
    order: Int[Array, "batch heads key"]
    size: int
    skipped: int

    @classmethod
    def of(cls, seen: Seen, size: int, skipped: int = 0) -> Windows:
        """Return the windows of all entries."""
        sets = seen.valid.shape[1]
        valid = jnp.repeat(seen.valid, seen.reader.attention.key_heads // sets, axis=1)
        rank = jnp.cumsum(valid, axis=-1) - 1 - skipped
        count = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True) - skipped, 0)
        return cls(rank, count, jnp.argsort(~valid, axis=-1, stable=True), size, skipped)

    def cut(
        self, x: Float[Array, "batch heads key width"]
    ) -> Float[Array, "batch heads window entry width"]:
        """Gather vectors by window; those of empty slots are 0."""
        taken = jnp.take_along_axis(x, self.order[..., None], axis=2)[:, :, self.skipped :]
        there = jnp.arange(taken.shape[2])[None, None] < self.count
        taken = jnp.where(there[..., None], taken, 0.0)
        missing = -taken.shape[2] % self.size if taken.shape[2] else self.size
        padded = jnp.pad(taken, [(0, 0), (0, 0), (0, missing), (0, 0)])
        return padded.reshape(*x.shape[:2], -1, self.size, x.shape[-1])

    def joined(
        self, score: Float[Array, "batch heads window entry"]
    ) -> Float[Array, "batch heads key"]:
        """Return the score of each entry; that of skipped entries and empty slots is meaningless
        and finite."""
        flat = score.reshape(*score.shape[:2], -1)
        return jnp.take_along_axis(flat, jnp.clip(self.rank, 0, flat.shape[-1] - 1), axis=2)
