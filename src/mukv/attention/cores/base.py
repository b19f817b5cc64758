"""What an attention core takes and answers: softmax(query . key) value over bags of entries.

All cores compute the same function; they differ in what they hold in memory and in what they
support. Bags stand in the order of their positions. A query that sees nothing yields zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import jax.numpy as jnp

from mukv.attention.entries import Entries
from mukv.attention.mask import Mask
from mukv.attention.recalled import Query, Recalled
from mukv.core.compute import Compute
from mukv.core.typing import Array, Bool, Float, Int, Weights
from mukv.position import AnyPosition, NoPE, Pairs
from mukv.position.base import Logits

Out = Float[Array, "batch kv_heads group query width"]


class Shown(NamedTuple):
    """Positions of some keys, and which of some queries see them. ordered: keys stand in the order
    of their positions."""

    position: Int[Array, "batch #kv_heads key"]
    visible: Bool[Array, "batch #kv_heads query key"]
    ordered: bool


class Part(NamedTuple):
    """One bag of entries: its keys and values, where they stand, and its own mask."""

    recalled: Recalled
    entries: Entries
    mask: Mask

    def shown(self, position: Int[Array, "batch query"]) -> Shown:
        """position: of the queries."""
        visible = self.mask.visible(position, self.entries)
        return Shown(self.entries.position, visible, self.entries.ordered)


@dataclass(frozen=True)
class Scores:
    """The way from products to logits.

    query: scaled, as positions see it; None where they add nothing. weights: those of the
    position encoding. sinks: a logit per head that takes its share of the softmax and gives
    nothing (gpt-oss); None for none. softcap: logits stay within +-softcap, by tanh, before
    positions add to them (Gemma 2).
    """

    query: Float[Array, "batch kv_heads group query query_dim"] | None
    query_position: Int[Array, "batch query"]
    weights: Weights
    sinks: Float[Array, "kv_heads group"] | None
    position: AnyPosition
    scale: float
    softcap: float | None

    def logits(self, products: Logits, shown: Shown) -> Logits:
        """Logits of all keys at once."""
        if not self.position.biases:
            return self._capped(products)
        return self.position.bias(self.weights, self._capped(products), self._pairs(shown))

    def block(self, products: Logits, shown: Shown, after: Array) -> tuple[Logits, Array]:
        """Logits of a block of keys, for a core that goes through the blocks right to left.

        after: what the blocks to the right have left to know, [batch kv_heads group query] zeros
        at first; the second result is what this block and they leave.
        """
        pairs = self._pairs(shown)
        return self.position.bias_block(self.weights, self._capped(products), pairs, after)

    def _capped(self, products: Logits) -> Logits:
        if self.softcap is None:
            return products
        return self.softcap * jnp.tanh(products / self.softcap)

    def _pairs(self, shown: Shown) -> Pairs:
        assert self.query is not None
        return Pairs(
            query=self.query,
            query_position=self.query_position,
            key_position=shown.position,
            visible=shown.visible,
            ordered=shown.ordered,
            scale=self.scale,
        )


@dataclass(frozen=True)
class Demand:
    """What a core is asked to do, known before any array exists.

    queries: per row. position: the encoding. ordered: whether the entries of every bag stand in
    the order of their positions. shows: why all logits are needed at once; None if they are not.
    """

    queries: int
    position: AnyPosition = field(default_factory=NoPE)
    ordered: bool = True
    shows: str | None = None


@dataclass(frozen=True)
class Core:
    """The contract."""

    @classmethod
    def made(cls, compute: Compute) -> Core:
        """The core as these settings ask for it."""
        return cls()

    @classmethod
    def supports(cls, demand: Demand, compute: Compute) -> str | None:
        """Why it can't do this; None if it can."""
        raise NotImplementedError

    def apply(self, query: Query, parts: Sequence[Part], scores: Scores) -> Out:
        """One softmax over all parts, in the type of the query."""
        raise NotImplementedError


def finite(top: Array) -> Array:
    """The largest logit, or 0 where nothing is visible."""
    return jnp.where(jnp.isfinite(top), top, 0.0)
