"""The interface of attention cores: softmax(query . key) value over bags of entries.

All cores compute the same function; they differ in memory use and in what they support. Bags are
given in the order of their positions. The output of a query that sees no entry is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

import jax.numpy as jnp

from mukv.attention.entries import Entries
from mukv.attention.mask import Mask
from mukv.attention.recalled import Query, Recalled
from mukv.core.compute import Compute, Platform
from mukv.core.typing import Array, Bool, Float, Int, Weights
from mukv.position import AnyPosition, NoPE, Pairs
from mukv.position.base import Logits

Out = Float[Array, "batch kv_heads group query width"]


UNKNOWN = "it is not known how its entries are stored"
"""Why a kernel does not read bags, unless their stored form is known."""


class Shown(NamedTuple):
    """Positions and visibility of some keys, for some queries.

    position: position of each key
    visible: whether each query sees each key
    ordered: whether keys lie in the order of their positions
    """

    position: Int[Array, "batch #kv_heads key"]
    visible: Bool[Array, "batch #kv_heads query key"]
    ordered: bool


class Part(NamedTuple):
    """One bag: its keys and values, its entries (for positions and validity), and its mask."""

    recalled: Recalled
    entries: Entries
    mask: Mask

    def shown(self, position: Int[Array, "batch query"]) -> Shown:
        """Return positions and visibility of all keys of the bag. position: of the queries."""
        visible = self.mask.visible(position, self.entries)
        return Shown(self.entries.position, visible, self.entries.ordered)


@dataclass(frozen=True)
class Scores:
    """Inputs from which the logits are computed, besides the products of queries and keys.

    query: scaled queries, as the position encoding reads them; None where it adds no bias
    query_position: position of each query in its document
    weights: weights of the position encoding
    sinks: logit per head that takes part in the softmax and has no value (gpt-oss); None for none
    position: position encoding
    scale: factor that the queries were multiplied with
    softcap: bound of the logits by tanh, before the position bias is added (Gemma 2); None for none
    """

    query: Float[Array, "batch kv_heads group query query_dim"] | None
    query_position: Int[Array, "batch query"]
    weights: Weights
    sinks: Float[Array, "kv_heads group"] | None
    position: AnyPosition
    scale: float
    softcap: float | None

    def logits(self, products: Logits, shown: Shown) -> Logits:
        """Compute the logits of all keys: softcap, then the position bias."""
        if not self.position.biases:
            return self._capped(products)
        return self.position.bias(self.weights, self._capped(products), self._pairs(shown))

    def block(self, products: Logits, shown: Shown, after: Array) -> tuple[Logits, Array]:
        """Compute the logits of one block of keys, for cores that visit blocks from right to left.

        after: carry from the blocks to the right, zeros for the rightmost one; see
            `Position.bias_block`

        Returns the logits and the carry for the next block to the left.
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
    """Requirements on a core, which are known before any array exists.

    queries: number of queries per row
    position: position encoding
    ordered: whether the entries of every bag lie in the order of their positions
    shows: why the logits of all pairs are needed at once; None if they are not
    aligned: whether the only bag has one entry per query, written by the query's own token
    dropped: whether entries are dropped between queries
    context: number of devices that the queries of a row are split over
    unread: why a kernel can't read the bags in their stored form; None if it can
    """

    queries: int
    position: AnyPosition = field(default_factory=NoPE)
    ordered: bool = True
    shows: str | None = None
    aligned: bool = False
    dropped: bool = False
    context: int = 1
    unread: str | None = UNKNOWN

    @property
    def step(self) -> bool:
        """Whether this is a step of decoding: one query per row, which reads a cache."""
        return self.queries == 1 and not self.aligned


@dataclass(frozen=True)
class Core:
    """Base class of attention cores.

    platforms: platforms on which the core may be chosen; None for all
    steps: whether the core is for steps of decoding (true) or never for them (false); None for
        neither
    """

    platforms: ClassVar[tuple[Platform, ...] | None] = None
    steps: ClassVar[bool | None] = None

    @classmethod
    def made(cls, compute: Compute) -> Core:
        """Build the core from the compute settings."""
        return cls()

    @classmethod
    def supports(cls, demand: Demand, compute: Compute) -> str | None:
        """Return why the core can't meet these demands; None if it can."""
        raise NotImplementedError

    def apply(self, query: Query, parts: Sequence[Part], scores: Scores) -> Out:
        """Attend to all parts in one softmax; the result has the type of the query."""
        raise NotImplementedError


def all_at_once(demand: Demand, compute: Compute) -> str | None:
    """Return why the plain core, which computes all logits at once, is needed or as good; None if
    there is no such reason. For `supports` of cores that compute logits in blocks."""
    if not compute.fused:
        return "compute.fused is false"
    if demand.shows is not None:
        return f"all logits are needed: {demand.shows}"
    if demand.queries == 1:
        return "one query: its logits need little memory"
    return None


def not_of_own_tokens(demand: Demand, compute: Compute) -> str | None:
    """Return why a kernel for entries of the queries' own tokens can't serve; None if it can."""
    if demand.position.biases:
        return f"{demand.position.kind} adds a bias to the logits"
    if not demand.aligned:
        return "its keys must be those of the queries' own tokens, in one bag"
    if demand.dropped:
        return "entries are dropped between queries (train.policy, or learned eviction)"
    return all_at_once(demand, compute)


@dataclass(frozen=True)
class KernelCore(Core):
    """Base class of cores that are hand-written kernels over entries of the queries' own tokens.

    operands: type that queries, keys and values are rounded to; None to keep their types
    interpret: whether the kernels are interpreted, on any platform, for tests
    """

    operands: str | None = None
    interpret: bool = False

    steps: ClassVar[bool | None] = False

    @classmethod
    def made(cls, compute: Compute) -> Core:
        return cls(compute.operands)

    @classmethod
    def supports(cls, demand: Demand, compute: Compute) -> str | None:
        return not_of_own_tokens(demand, compute)


def operands(query: Query, part: Part, kind: str | None) -> tuple[Array, Array, Array]:
    """Return queries, keys and values as one array each, with as many heads of values as of keys.

    kind: type that they are rounded to; None to keep their types
    """
    keys, values = part.recalled.dense(query[0].shape[1])
    asked = jnp.concatenate(query, axis=-1)
    asked, keys, values = (x.astype(kind or x.dtype) for x in (asked, keys, values))
    return asked, keys, values


def finite(top: Array) -> Array:
    """Replace a maximum of -inf, that of a query which sees no key, by 0."""
    return jnp.where(jnp.isfinite(top), top, 0.0)
