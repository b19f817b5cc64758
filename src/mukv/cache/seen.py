"""What there is to judge entries by when a body must choose which of them to keep."""

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
    """entries: all that could stay, in the order of their positions. length: tokens of each row
    before the new ones, of which there are `added`. number: entries that each store may keep.
    carried: what was noted of each entry when it was judged last, 0 for new ones. notes: what was
    noted besides.
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
        """The newest `number` tokens of each row."""
        first = jnp.asarray(self.length + self.added - number)[:, None, None]
        return self.valid & (self.entries.position >= first)

    def first(self, number: int) -> Bool[Array, "batch stores key"]:
        """The oldest `number` tokens."""
        return self.valid & (self.entries.position < number)

    def keys(self) -> Float[Array, "batch kv_heads key query_dim"]:
        """Keys as queries see them: what they answer to the unit vectors."""
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

    def last(self, number: int) -> Int[Array, "batch query"]:
        """Places of the last `number` new queries; negative where there are fewer."""
        return self.added[:, None] - number + jnp.arange(number)

    def weights(
        self, place: Int[Array, "batch query"]
    ) -> Float[Array, "batch kv_heads group query key"]:
        """What the new queries at these places give to each entry; 0 for places without one."""
        attention = self.reader.attention
        queries, position = self.queries, self.length[:, None] + place
        index = jnp.clip(place, 0, queries.shape[3] - 1)[:, None, None, :, None]
        queries = jnp.take_along_axis(queries, index, axis=3)
        address, scores = attention.asked(self.reader.weights, queries, position)
        recalled = attention.recall(self.reader.weights, self.entries)
        part = cores.Part(recalled, self.entries, Mask())
        weights, total = cores.weighed(address, [part], scores)
        there = (place >= 0) & (place < self.added[:, None])
        return jnp.where(there[:, None, None, :, None], weights / total, 0.0)
