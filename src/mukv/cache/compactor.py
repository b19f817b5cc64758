"""Eviction by leverage and by attention that looks forward as well (Compactor)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.cache.by_value import by_head, leverage
from mukv.cache.keep import CARRIED, Sinking
from mukv.cache.seen import Score, Seen
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Bool, Float, Int

LEAST = 1e-6
"""Least standard deviation that scores are divided by, as in kvpress."""


@dataclass(frozen=True)
class Compactor(Sinking):
    """Score: z(attention) + blend z(leverage), where z is the distance to the mean in standard
    deviations over all heads of the layer (Compactor, Chari et al. 2025).

    Leverage is that of `leverage`. Attention is the column sum of softmax(q k), not scaled, within
    blocks of tokens and without a causal mask, mean over the heads of a group, times |v|, smoothed
    over three neighbours. The first and newest tokens are kept for certain and take no part. At a
    fold, entries keep the attention of the block in which they were read.

    sinks: number of first tokens that are always kept
    recent: number of newest tokens that are always kept
    block: tokens per block
    sketch: width of the random projection of keys
    seed: seed of the random projection
    blend: weight of the leverage; None for the fraction of entries that is dropped
    """

    sinks: int = 8
    recent: int = 4
    block: int = 256
    sketch: int = 48
    seed: int = 0
    blend: float | None = None

    needs_queries: ClassVar[bool] = True
    carries: ClassVar[bool] = True
    signed: ClassVar[bool] = True
    rotates_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "block", "sketch", most=1 << 16)
        if not 0 <= self.seed < 1 << 31:
            raise BadInput("seed", self.seed, "from 0 to 2**31 - 1")
        if self.blend is not None and self.blend < 0:
            raise BadInput("blend", self.blend, "at least 0, or null")

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        which = by_head(seen, seen.valid & ~self.must(seen))
        share = leverage(seen, which, self.sketch, self.seed)
        carried = self._attention(seen, which)
        attention = standard(smoothed(carried, which), which)
        score = attention + self._weight(seen)[:, None, None] * standard(share, which)
        return jnp.where(which, score, 0.0), {CARRIED: carried}

    def _weight(self, seen: Seen) -> Float[Array, " batch"]:
        """Return the weight of the leverage in each row."""
        if self.blend is not None:
            return jnp.full(len(seen.length), self.blend)
        if self.budget.amount <= 1:
            return jnp.full(len(seen.length), 1 - self.budget.amount)
        read = jnp.maximum(seen.length + seen.added, 1)
        return jnp.maximum(1 - seen.number / read, 0.0)

    def _attention(self, seen: Seen, which: Bool[Array, "batch kv_heads key"]) -> Score:
        """Return the attention of each entry in its block times |v|: of new entries that take part,
        that of their block; of those kept for certain the mean; of old ones what is carried."""
        assert seen.carried is not None
        heads = which.shape[1]
        position = jnp.repeat(
            seen.entries.position, heads // seen.entries.position.shape[1], axis=1
        )
        carried = jnp.repeat(seen.carried, heads // seen.carried.shape[1], axis=1)
        # Of the new tokens those from `first` on to `end` take part; they are entries in a row.
        first = jnp.clip(self.sinks - seen.length, 0, None)
        end = jnp.maximum(seen.added - self.recent, first)
        new = which & (position >= (seen.length + first)[:, None, None])
        order = jnp.argsort(~new, axis=-1, stable=True)
        column = self._columns(
            seen, jnp.take_along_axis(seen.keys(), order[..., None], 2), first, end
        )
        place = jnp.clip(position - (seen.length + first)[:, None, None], 0, column.shape[-1] - 1)
        own = jnp.take_along_axis(column, place, axis=2)
        own *= jnp.linalg.norm(seen.values().astype(jnp.float32), axis=-1)
        found = jnp.where(new, own, jnp.where(which, carried, 0.0))
        number = jnp.maximum(jnp.sum(which, axis=(1, 2), keepdims=True), 1)
        return jnp.where(which, found, jnp.sum(found, axis=(1, 2), keepdims=True) / number)

    def _columns(
        self,
        seen: Seen,
        key: Float[Array, "batch kv_heads key width"],
        first: Int[Array, " batch"],
        end: Int[Array, " batch"],
    ) -> Float[Array, "batch kv_heads token"]:
        """Return the sum of each new key's attention weights in its block, mean over the heads of a
        group.

        key: keys of the new tokens from `first` to `end` are in front
        """
        queries = seen.queries.astype(jnp.float32)
        tokens = queries.shape[3]
        size = min(self.block, tokens)
        count = -(-tokens // size)
        place = jnp.arange(count * size)[None]
        index = jnp.clip(first[:, None] + place, 0, tokens - 1)[:, None, None, :, None]
        queries = jnp.take_along_axis(queries, index, axis=3)
        key = jnp.pad(key[:, :, :tokens], [(0, 0), (0, 0), (0, count * size), (0, 0)])
        there = place < (end - first)[:, None]

        def block(number: Int[Array, ""]) -> Float[Array, "batch kv_heads token"]:
            def cut(x: Array, axis: int) -> Array:
                return jax.lax.dynamic_slice_in_dim(x, number * size, size, axis)

            shown = cut(there, 1)[:, None, None]
            logits = jnp.einsum("bhgqd,bhkd->bhgqk", cut(queries, 3), cut(key, 2))
            weights = jax.nn.softmax(jnp.where(shown[..., None, :], logits, -1e30), axis=-1)
            weights = jnp.where(shown[..., None] & shown[..., None, :], weights, 0.0)
            return jnp.mean(jnp.sum(weights, axis=3), axis=2)

        columns = jax.lax.map(block, jnp.arange(count))
        return jnp.moveaxis(columns, 0, 2).reshape(*key.shape[:2], count * size)


def standard(score: Score, which: Bool[Array, "batch heads key"]) -> Score:
    """Return the distance to the mean in standard deviations (unbiased) over all heads of a row.

    which: entries that count; the result is meaningless and finite for others
    """
    number = jnp.sum(which, axis=(1, 2), keepdims=True)
    mean = jnp.sum(jnp.where(which, score, 0.0), axis=(1, 2), keepdims=True) / jnp.maximum(
        number, 1
    )
    square = jnp.sum(jnp.where(which, score - mean, 0.0) ** 2, axis=(1, 2), keepdims=True)
    deviation = jnp.sqrt(square / jnp.maximum(number - 1, 1))
    return (score - mean) / jnp.maximum(deviation, LEAST)


def smoothed(score: Score, which: Bool[Array, "batch heads key"]) -> Score:
    """Return the sum of each entry's score and those of its two neighbours among the entries that
    count, divided by 3; meaningless and finite for others."""
    order = jnp.argsort(~which, axis=-1, stable=True)
    score = jnp.where(
        jnp.take_along_axis(which, order, 2), jnp.take_along_axis(score, order, 2), 0.0
    )
    wide = jnp.pad(score, [(0, 0), (0, 0), (1, 1)])
    total = (wide[..., :-2] + wide[..., 1:-1] + wide[..., 2:]) / 3
    rank = jnp.clip(jnp.cumsum(which, axis=-1) - 1, 0, None)
    return jnp.take_along_axis(total, rank, axis=2)
