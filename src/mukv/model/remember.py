"""Return what the queries of a layer read, and update its memory in a pass with a cache.

The classes for passes with a cache are pytrees, because a layer of such a pass is a compiled
function of its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, no_type_check

import jax
import jax.numpy as jnp

from mukv.attention import Bag, EntryStore, Queries, Written
from mukv.cache import Reader, Slot
from mukv.cache.base import QUERY
from mukv.core.programs import Subprogram
from mukv.core.typing import Array, Bool, Float, Int
from mukv.model.cache_update import LayerMemory
from mukv.model.evicting import AnyThrough
from mukv.model.passes import Asked
from mukv.model.plan import ResolvedLayer


@dataclass(frozen=True)
class WholeRows:
    """Whole rows, without a cache.

    position: place of each token in its document, from 0
    segment: number of each token's document; None for one document per row
    through: a cache policy or gates that drop entries between tokens; None for none
    place: function of a layer and the name of a store; see `Stack.place`
    later: number of a layer minus its index, which differ if the repeats of a stage are scanned
    """

    position: Int[Array, "batch token"]
    segment: Int[Array, "batch token"] | None
    through: AnyThrough | None
    place: Callable[[ResolvedLayer, str], tuple[int, int]]
    later: Int[Array, ""] | int = 0

    def __call__(
        self,
        layer: ResolvedLayer,
        reading: Any,
        memory: LayerMemory | None,
        written: Written,
        query: Asked,
    ) -> tuple[tuple[Bag, ...], LayerMemory | None]:
        def read(name: str, bag: EntryStore) -> Bag:
            entries = bag.entries(written[name], self.position, self.segment)
            if self.through is None or bag.window is not None:
                return entries
            where = self.place(layer, name), name
            given = reading, query, self.segment, layer.index + self.later
            return self.through.limited(layer, entries, *where, *given)

        return tuple(read(*bag) for bag in layer.bags.items()), memory


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Several:
    """Several tokens per row, whose entries join the bodies: prefill, or a block of steps.

    length: tokens of each row before them
    count: number of them in each row
    position: position of each
    fresh: whether there are none before
    as_steps: whether they read what the policy lets a decode step read, and not all that is kept
    joins: whether their entries join the bodies; if not, no memory is returned
    """

    length: Int[Array, " batch"]
    count: Int[Array, " batch"]
    position: Int[Array, "batch token"]
    fresh: bool = field(metadata={"static": True})
    as_steps: bool = field(metadata={"static": True}, default=False)
    joins: bool = field(metadata={"static": True}, default=True)

    def __call__(
        self,
        layer: ResolvedLayer,
        reading: Any,
        memory: LayerMemory | None,
        written: Written,
        query: Asked,
    ) -> tuple[tuple[Bag, ...], LayerMemory]:
        assert memory is not None
        slots: dict[str, Slot] = {}
        parts: list[Bag] = []
        for name, bag in layer.bags.items():
            slot, new = memory.slots[name], written[name]
            if self.joins:
                asked = query() if slot.body.needs_queries else None
                reader = Reader(layer.softmax, reading, asked, None, query.x)
                slots[name] = slot.extended(new, self.length, self.count, reader, self.fresh)
            held, newest = slot.limited(bag.entries(new, self.position))
            if not self.fresh:
                by_query = self.as_steps and held.body.by_query
                parts.append(held.bag(self.length) if by_query else held.entries(self.length))
            parts.append(newest)
        states = states_of(layer, written) if self.joins else {}
        return tuple(parts), LayerMemory(slots, states)


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class One:
    """One token per row, whose entry joins the tails.

    length: tokens of each row in the bodies
    filled: tokens in the tails
    which: rows whose token is kept; None for all rows
    """

    length: Int[Array, " batch"]
    filled: Int[Array, "*row"]
    which: Bool[Array, " batch"] | None

    def __call__(
        self,
        layer: ResolvedLayer,
        _: Any,
        memory: LayerMemory | None,
        written: Written,
        query: Asked,
    ) -> tuple[tuple[Bag, ...], LayerMemory]:
        more = 1 if self.which is None else self.which.astype("int32")
        assert memory is not None
        slots: dict[str, Slot] = {}
        parts: list[Bag] = []
        for name in layer.bags:
            slot, new = memory.slots[name], written[name]
            if QUERY in slot.tail:
                new = {**new, QUERY: by_head(query())}
            slots[name] = slot = slot.appended(new, self.length, self.filled, self.which)
            held, newest = slot.limited(slot.newest(self.length, self.filled + more))
            parts += held.bag(self.length), newest
        return tuple(parts), LayerMemory(slots, states_of(layer, written))


@partial(Subprogram, static=1)
def positions(number: int, length: Int[Array, " batch"]) -> Int[Array, "batch token"]:
    """Return the positions of this number of tokens behind rows of these lengths."""
    return length[:, None] + jnp.arange(number)[None]


@Subprogram
def length_after(length: Int[Array, " batch"], count: Int[Array, " batch"]) -> Array:
    """Return the lengths of rows after `count` more tokens."""
    return length + count


def states_of(layer: ResolvedLayer, written: Written) -> dict[str, Any]:
    """Return the new states among what a layer wrote."""
    return {name: written[name] for name in layer.attention.states}


def by_head(query: Queries) -> Float[Array, "batch heads query query_dim"]:
    """Join KV heads and groups to the axis of heads, as tails store queries."""
    batch, kv_heads, group, length, width = query.shape
    return query.reshape(batch, kv_heads * group, length, width)
