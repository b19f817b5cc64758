"""A large body that a decode loop only reads, a small tail that it writes, folded in now and then.

What a layer keeps in its body is the body's own affair: a ring of everything (here), or what a
policy leaves (`kept.py`). Nothing large is copied per token: only folding, once per tail, passes
over the bodies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp

from mukv.attention import AnyAttention, Bag, Entries, Queries, Query, Recall, Retrieved
from mukv.attention.mixer import EntryStore, Written
from mukv.core.typing import Array, Bool, Float, Int

Tensors = dict[str, Float[Array, "batch _ slot _"]]
Token = dict[str, Float[Array, "batch _ 1 _"]]
Tail = dict[str, Float[Array, "batch _ place _"]]
QUERY = "query"
"""Name in a tail of the queries of its tokens, where what stays depends on them."""


@no_type_check
@dataclass(frozen=True)
class Reader:
    """Who reads a body: the layer that writes it. weights: those that it reads with. queries:
    of the new tokens, where a body needs them."""

    attention: AnyAttention
    weights: Mapping[str, Any]
    queries: Queries | None = None


@runtime_checkable
class Body(Protocol):
    """What is kept of one store apart from its tail. It counts entries, not tokens: lengths and
    positions are numbers of entries."""

    @property
    def needs_queries(self) -> bool:
        """Whether what stays depends on queries."""
        ...

    def bag(self, length: Int[Array, " batch"]) -> Bag:
        """What the query of one token reads. length: entries folded so far."""
        ...

    def entries(self, length: Int[Array, " batch"]) -> Entries:
        """All that is kept."""
        ...

    def extended(
        self,
        new: Tensors,
        length: Int[Array, " batch"],
        added: Int[Array, " batch"],
        reader: Reader,
        fresh: bool = False,
    ) -> Body:
        """With `added` more entries per row, the first ones of `new`. fresh: nothing is in it
        yet."""
        ...


# JAX also rebuilds a pytree with things that are no arrays: shapes can't be checked here.
@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slot:
    """What is kept of one store of entries: a body, and a tail of the newest entries. It turns
    numbers of tokens, which the cache counts, into numbers of entries, which the body counts."""

    body: Body
    tail: Tail
    store: EntryStore = field(default=EntryStore(), metadata={"static": True})

    def bag(self, length: Int[Array, " batch"]) -> Bag:
        """What the query of one token reads of the body. length: tokens folded so far."""
        return self._of_tokens(self.body.bag(self.store.count(length)))

    def entries(self, length: Int[Array, " batch"]) -> Bag:
        """All of the body."""
        return self._of_tokens(self.body.entries(self.store.count(length)))

    def newest(self, length: Int[Array, " batch"], filled: Int[Array, "*row"]) -> Bag:
        """What is in the tail after `filled` tokens."""
        added = self.store.added(length, filled)
        return self._of_tokens(tail_entries(self.tail, self.store.count(length), added))

    def appended(
        self,
        new: Token,
        length: Int[Array, " batch"],
        filled: Int[Array, "*row"],
        which: Bool[Array, " batch"] | None,
    ) -> Slot:
        """With one more token behind the `filled` ones. which: rows that go on; None for all."""
        if self.store.every > 1:
            last = jnp.broadcast_to(length + filled, length.shape) + 1
            closes = last % self.store.every == 0
            filled = self.store.added(length, filled)
            which = closes if which is None else which & closes
        if which is None:
            return replace(self, tail=append(self.tail, new, filled))
        return replace(self, tail=append_some(self.tail, new, filled, which))

    def extended(
        self,
        new: Tensors,
        length: Int[Array, " batch"],
        added: Int[Array, " batch"],
        reader: Reader,
        fresh: bool = False,
    ) -> Slot:
        """With the entries of `added` more tokens in the body, the first ones of `new`."""
        count, more = self.store.count(length), self.store.added(length, added)
        return replace(self, body=self.body.extended(new, count, more, reader, fresh))

    def _of_tokens(self, bag: Bag) -> Bag:
        return bag if self.store == EntryStore() else Paced(bag, self.store)


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Paced:
    """A bag whose positions are numbers of entries, seen by queries that count tokens."""

    bag: Bag
    store: EntryStore = field(metadata={"static": True})

    def retrieve(self, query: Query, recall: Recall) -> Retrieved:
        recalled, entries = self.bag.retrieve(query, lambda found: recall(self._placed(found)))
        return recalled, self._placed(entries)

    def _placed(self, entries: Entries) -> Entries:
        position = self.store.last_token(entries.position)
        every, window = self.store.every, self.store.window
        return replace(entries, position=position, window=window, every=every)


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """slots: one per store of entries of each layer that writes, in order.
    states: of each layer that writes, the arrays of its state stores.
    length: tokens of each row that have been folded into the bodies.
    filled: tokens in the tails: one number for all rows, or one for each.
    tail_size: tokens that the tails have room for.
    """

    slots: tuple[Slot, ...]
    states: tuple[Written, ...]
    length: Int[Array, " batch"]
    filled: Int[Array, "*row"]
    tail_size: int = field(metadata={"static": True})

    def position(self) -> Int[Array, " batch"]:
        """Position of the token that comes next in each row."""
        return self.length + self.filled

    def split(self) -> tuple[Any, Any]:
        """What a decode loop only reads, and what its steps write: the loop carries the latter."""
        bodies = tuple(replace(slot, tail=None) for slot in self.slots)
        tails = tuple(slot.tail for slot in self.slots)
        frozen = replace(self, slots=bodies, states=None, filled=None)
        return frozen, (tails, self.states, self.filled)

    @classmethod
    def join(cls, frozen: Any, live: Any) -> Cache:
        """The inverse of `split`."""
        tails, states, filled = live
        slots = tuple(
            replace(slot, tail=tail) for slot, tail in zip(frozen.slots, tails, strict=True)
        )
        return replace(frozen, slots=slots, states=states, filled=filled)

    def nbytes(self) -> int:
        """Bytes as allocated (or as they would be, for abstract arrays)."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ring:
    """The entry of position p lies in slot p modulo capacity: a full cache is a ring that never
    wraps, a window one that does. Positions follow from the number of tokens alone and need no
    memory."""

    tensors: Tensors
    wraps: bool = field(metadata={"static": True})

    @property
    def needs_queries(self) -> bool:
        return False

    def bag(self, length: Int[Array, " batch"]) -> Bag:
        return self.entries(length)

    def entries(self, length: Int[Array, " batch"]) -> Entries:
        return body_entries(self.tensors, length, self.wraps)

    def extended(
        self,
        new: Tensors,
        length: Int[Array, " batch"],
        added: Int[Array, " batch"],
        reader: Reader,
        fresh: bool = False,
    ) -> Ring:
        return Ring(fold(self.tensors, new, length, added), self.wraps)


def ring_position(length: Int[Array, " batch"], capacity: int) -> Int[Array, "batch slot"]:
    """Position that each slot of a ring holds after `length` tokens; negative where empty.

    It is the largest p < length with p = slot modulo capacity.
    """
    newest = length[:, None] - 1
    return newest - (newest - jnp.arange(capacity)[None]) % capacity


def body_entries(tensors: Tensors, length: Int[Array, " batch"], wraps: bool) -> Entries:
    """A ring as a bag of entries. wraps: it may have seen more tokens than it has slots."""
    capacity = next(iter(tensors.values())).shape[2]
    position = ring_position(length, capacity)[:, None]
    return Entries(tensors, position, valid=position >= 0, ordered=not wraps)


def tail_entries(
    tensors: Tail, length: Int[Array, " batch"], filled: Int[Array, "*row"]
) -> Entries:
    """The first `filled` places of the tail as a bag of entries."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != QUERY}
    place = jnp.arange(next(iter(tensors.values())).shape[2])[None, None]
    position = length[:, None, None] + place
    return Entries(
        tensors, position, valid=jnp.broadcast_to(place < filled.reshape(-1, 1, 1), position.shape)
    )


def append(tail: Tail, new: Token, filled: Int[Array, ""]) -> Tail:
    """Write the entries of one token behind the `filled` ones."""
    return {
        name: jax.lax.dynamic_update_slice_in_dim(
            tail[name], new[name].astype(tail[name].dtype), filled, axis=2
        )
        for name in tail
    }


def append_some(
    tail: Tail, new: Token, filled: Int[Array, " batch"], which: Bool[Array, " batch"]
) -> Tail:
    """The same where rows have tails of their own length, and only some go on."""
    rows = jnp.arange(len(filled))

    def one(old: Array, fresh: Array) -> Array:
        # A place that there isn't is one that nothing is written to.
        place = jnp.where(which, filled, old.shape[2])
        return old.at[rows, :, place].set(fresh[:, :, 0].astype(old.dtype), mode="drop")

    return {name: one(tail[name], new[name]) for name in tail}


def fold(
    body: Tensors,
    new: Tail,
    length: Int[Array, " batch"],
    added: Int[Array, " batch"],
) -> Tensors:
    """The ring after `added` more tokens per row, whose entries are the first ones of `new`.

    Each slot asks which position it must hold now, and takes it from `new` if it is one of its
    positions: a gather, so rows of different lengths and rings that wrap need nothing special.
    """

    def one(old: Array, fresh: Array) -> Array:
        position = ring_position(length + added, old.shape[2])
        source = position - length[:, None]
        index = jnp.clip(source, 0, fresh.shape[2] - 1)[:, None, :, None]
        taken = jnp.take_along_axis(fresh.astype(old.dtype), index, axis=2)
        return jnp.where((source >= 0)[:, None, :, None], taken, old)

    return {name: one(body[name], new[name]) for name in body}
