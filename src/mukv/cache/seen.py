"""Inputs of the score functions of eviction policies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from mukv.attention import Entries, Queries, cores
from mukv.attention.mask import Mask
from mukv.cache.base import Reader
from mukv.core.typing import Array, Bool, Float, Int

Score = Float[Array, "batch heads key"]


@dataclass(frozen=True)
class Seen:
    """Candidate entries and the state of a policy.

    reader: layer that reads the entries, with its weights and new queries
    entries: all candidates, in the order of their positions
    length: tokens of each row before the new ones
    added: number of new tokens of each row
    number: number of entries that each store may keep
    carried: accumulated score of each entry, 0 for new ones; None if scores are not accumulated
    notes: state of the policy from its last choice
    """

    reader: Reader
    entries: Entries
    length: Int[Array, " batch"]
    added: Int[Array, " batch"]
    number: Int[Array, " batch"]
    carried: Float[Array, "batch stores key"] | None
    notes: Mapping[str, Array]

    @property
    def queries(self) -> Queries:
        assert self.reader.queries is not None
        return self.reader.queries

    @property
    def valid(self) -> Bool[Array, "batch stores key"]:
        assert self.entries.valid is not None
        return self.entries.valid

    def recent(self, number: Int[Array, "*batch"] | int) -> Bool[Array, "batch stores key"]:
        """Return which entries are among the newest `number` tokens of each row."""
        first = jnp.asarray(self.length + self.added - number)[:, None, None]
        return self.valid & (self.entries.position >= first)

    def first(self, number: int) -> Bool[Array, "batch stores key"]:
        """Return which entries are among the oldest `number` tokens of each row."""
        return self.valid & (self.entries.position < number)

    def keys(self) -> Float[Array, "batch kv_heads key query_dim"]:
        """Return the keys that queries are multiplied with, from their products with
        unit vectors.
        """
        attention = self.reader.attention
        recalled = attention.recall(self.reader.weights, self.entries)
        shape = (len(self.length), attention.key_heads, 1, 1, 1)
        units = jnp.tile(jnp.eye(attention.query_dim), shape)
        products = recalled.products(attention.address(self.reader.weights, units))
        return products[:, :, 0].swapaxes(-1, -2)

    def values(self) -> Float[Array, "batch kv_heads key value_dim"]:
        attention = self.reader.attention
        recalled = attention.recall(self.reader.weights, self.entries)
        return recalled.dense(attention.key_heads)[1]

    def rotated(
        self, x: Float[Array, "batch heads token width"], position: Int[Array, "..."]
    ) -> Float[Array, "batch heads token width"]:
        """Rotate keys or queries by position alone; only the last `rotated_dim` dimensions are
        rotated.
        """
        attention = self.reader.attention
        start = x.shape[-1] - attention.rotated_dim
        turned = attention.rotate(x[..., start:], position)
        return jnp.concatenate([x[..., :start], turned], axis=-1)

    def rotated_back(
        self, x: Float[Array, "batch heads token width"], position: Int[Array, "..."]
    ) -> Float[Array, "batch heads token width"]:
        """Undo the rotation of keys or queries."""
        # A factor of the rotation (YaRN) is divided out twice, because rotating back multiplies by
        # it again.
        ones = jnp.ones((1, 1, 1, x.shape[-1]))
        gain = self.rotated(ones, jnp.zeros((1, 1, 1), jnp.int32))
        return self.rotated(x, -position) / gain**2

    def last(self, number: int) -> Int[Array, "batch query"]:
        """Return the indices of the last `number` new queries; negative where there are fewer."""
        return self.added[:, None] - number + jnp.arange(number)[None]

    def weights(
        self, place: Int[Array, "batch query"]
    ) -> Float[Array, "batch kv_heads group query key"]:
        """Return the attention weights of the new queries at these indices; 0 for
        negative indices.

        Query i lies at place i modulo the number of places, where only the newest ones are kept.
        """
        attention = self.reader.attention
        queries, position = self.queries, self.length[:, None] + place
        index = (jnp.maximum(place, 0) % queries.shape[3])[:, None, None, :, None]
        queries = jnp.take_along_axis(queries, index, axis=3)
        address, scores = attention.scaled_queries(self.reader.weights, queries, position)
        recalled = attention.recall(self.reader.weights, self.entries)
        part = cores.Part(recalled, self.entries, Mask())
        weights, total = cores.weighed(address, [part], scores)
        there = (place >= 0) & (place < self.added[:, None])
        return jnp.where(there[:, None, None, :, None], weights / total, 0.0)
