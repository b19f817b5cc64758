"""Keep whole chunks of neighbouring tokens, the same in all heads (ChunkKV, Liu et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mukv.cache.refine import Refine
from mukv.cache.seen import Seen
from mukv.core.counts import require_counts
from mukv.core.typing import Array, Float, Int


@dataclass(frozen=True)
class WholeChunks(Refine):
    """Score: mean score of a chunk of tokens, over all heads (ChunkKV, Liu et al. 2025).

    Entries that are always kept do not count. The budget is exact: where the last chunk does not
    fit as a whole, only its newest entries are kept.

    size: tokens per chunk
    """

    size: int = 20

    def __post_init__(self) -> None:
        require_counts(self, "size")

    def apply(
        self,
        score: Float[Array, "batch stores key"],
        seen: Seen,
        number: Int[Array, "batch #stores 1"],
    ) -> Float[Array, "batch stores key"]:
        position = jnp.broadcast_to(seen.entries.position, score.shape)
        flat = (x.reshape(len(score), -1) for x in (score, position // self.size))
        return jax.vmap(_mean_of_equals)(*flat).reshape(score.shape)


def _mean_of_equals(score: Float[Array, " entry"], chunk: Int[Array, " entry"]) -> Array:
    """Replace each finite score by the mean of the finite scores of its chunk."""
    # Chunks are numbered in the order in which they occur among the sorted entries.
    order = jnp.argsort(chunk)
    starts = jnp.diff(chunk[order], prepend=chunk[order[:1]]) != 0
    number = jnp.zeros_like(chunk).at[order].set(jnp.cumsum(starts).astype(chunk.dtype))
    counted = jnp.isfinite(score)

    def total(x: Array) -> Array:
        return jax.ops.segment_sum(jnp.where(counted, x, 0.0), number, len(chunk))[number]

    mean = total(score) / jnp.maximum(total(jnp.ones_like(score)), 1.0)
    return jnp.where(counted, mean, score)
