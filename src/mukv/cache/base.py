"""The cache: for each store of entries a large body, which a decode loop only reads, and a small
tail, which it writes.

When the tails are full, their entries are folded (moved) into the bodies. The bodies are therefore
copied once per tail, and not once per token. A body is a ring buffer of all entries (here), or
holds the entries that a policy keeps (`kept.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, no_type_check, runtime_checkable

import jax
import jax.numpy as jnp

from mukv.attention import Attention, Bag, Entries, Queries
from mukv.attention.mixer import EntryStore, Written
from mukv.cache.paced import Paced
from mukv.core.typing import Array, Bool, Float, Int, Residual

SlotArrays = dict[str, Float[Array, "batch _ slot _"]]
Token = dict[str, Float[Array, "batch _ 1 _"]]
Tail = dict[str, Float[Array, "batch _ place _"]]
QUERY = "query"
"""Name of the queries in a tail; stored only for policies that choose entries by queries."""


@no_type_check
@dataclass(frozen=True)
class Reader:
    """The layer that reads a body, whose attention a policy uses to choose entries.

    attention: its attention variant
    weights: its weights for reading
    queries: its queries of the new tokens; None if the body needs no queries
    scores: of the new entries, where another pass has made them; None where the policy scores them
    inputs: the new tokens as the layer gets them, after its norm; None at a fold
    """

    attention: Attention
    weights: Mapping[str, Any]
    queries: Queries | None = None
    scores: Float[Array, "batch heads key"] | None = None
    inputs: Residual | None = None


@runtime_checkable
class Body(Protocol):
    """The entries of one store, without those in its tail. The lengths and positions of these
    methods count entries, not tokens."""

    @property
    def needs_queries(self) -> bool:
        """Whether what is kept of new entries depends on queries."""
        ...

    @property
    def last_queries(self) -> int | None:
        """Number of the newest queries that a tail keeps, if the body needs queries; None for all,
        0 if it needs those of a prompt only."""
        ...

    @property
    def by_query(self) -> bool:
        """Whether `bag` chooses entries for one query, and not the same ones for all."""
        ...

    def bag(self, length: Int[Array, " batch"]) -> Bag:
        """Return the entries that the query of one token may read.

        length: number of entries folded so far
        """
        ...

    def entries(self, length: Int[Array, " batch"]) -> Entries:
        """Return all entries of the body. length: entries folded so far."""
        ...

    def limited(self, newest: Entries) -> tuple[Body, Entries]:
        """Return this body and newer entries as queries read them, where the policy decides which
        queries may see an entry."""
        ...

    def for_steps(self) -> Body:
        """Return the body without what only the next choice of entries needs."""
        ...

    def extended(
        self,
        new: SlotArrays,
        length: Int[Array, " batch"],
        added: Int[Array, " batch"],
        reader: Reader,
        fresh: bool = False,
    ) -> Body:
        """Return the body after the first `added` entries of `new` were folded into each row.

        length: entries folded so far. reader: the layer that reads the body. fresh: the body is
        known to be empty.
        """
        ...


class AllRead:
    """Base class of bodies all of whose entries every query reads."""

    @property
    def last_queries(self) -> int | None:
        """See `Body`."""
        return None

    @property
    def by_query(self) -> bool:
        """See `Body`."""
        return False

    def bag(self, length: Int[Array, " batch"]) -> Bag:
        """See `Body`."""
        return self.entries(length)

    def entries(self, length: Int[Array, " batch"]) -> Entries:
        """See `Body`."""
        raise NotImplementedError

    def limited(self, newest: Entries) -> tuple[Any, Entries]:
        """See `Body`."""
        return self, newest

    def for_steps(self) -> Any:
        """See `Body`."""
        return self


# JAX also builds pytrees whose leaves are not arrays, so that shapes can't be checked here.
@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slot:
    """One store of entries: a body, and a tail of the newest entries.

    Converts numbers of tokens, which the cache counts, to numbers of entries, which the body
    counts.
    """

    body: Body
    tail: Tail
    store: EntryStore = field(default=EntryStore(), metadata={"static": True})

    def for_steps(self) -> Slot:
        """Return the slot without what only the next choice of entries needs.

        The steps of policies that differ only in that choice are one compiled program.
        """
        tail = {name: tensor for name, tensor in self.tail.items() if name != QUERY}
        return replace(self, body=self.body.for_steps(), tail=tail)

    def bag(self, length: Int[Array, " batch"]) -> Bag:
        """Return the entries of the body that the query of one token may read.

        length: tokens folded so far.
        """
        return self._of_tokens(self.body.bag(self.store.count(length)))

    def entries(self, length: Int[Array, " batch"]) -> Bag:
        """Return all entries of the body. length: tokens folded so far."""
        return self._of_tokens(self.body.entries(self.store.count(length)))

    def newest(self, length: Int[Array, " batch"], filled: Int[Array, "*row"]) -> Bag:
        """Return the entries of the tail. length: tokens folded so far. filled: tokens in the
        tail."""
        added = self.store.added(length, filled)
        return self._of_tokens(tail_entries(self.tail, self.store.count(length), added))

    def limited(self, newest: Bag) -> tuple[Slot, Bag]:
        """Return this slot and newer entries as queries read them; see `Body.limited`."""
        if not isinstance(newest, Entries):
            return self, newest
        body, newest = self.body.limited(newest)
        return replace(self, body=body), newest

    def appended(
        self,
        new: Token,
        length: Int[Array, " batch"],
        filled: Int[Array, "*row"],
        which: Bool[Array, " batch"] | None,
    ) -> Slot:
        """Return the slot with one more token written after the `filled` ones of the tail.

        which: rows that get a token; None for all. A store with one entry per m tokens is written
        only in rows where the token completes an entry.
        """
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
        new: SlotArrays,
        length: Int[Array, " batch"],
        added: Int[Array, " batch"],
        reader: Reader,
        fresh: bool = False,
    ) -> Slot:
        """Return the slot after the entries of `added` more tokens, the first ones of `new`, were
        folded into the body."""
        count, more = self.store.count(length), self.store.added(length, added)
        return replace(self, body=self.body.extended(new, count, more, reader, fresh))

    def _of_tokens(self, bag: Bag) -> Bag:
        if self.store == EntryStore():
            return bag
        paced = Paced(bag, self.store)
        return paced.placed(bag) if isinstance(bag, Entries) else paced


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Cache:
    """The entries and states of all layers of a stack while decoding.

    slots: one per store of entries of each layer that writes, in order
    states: of each layer that writes, the arrays of its state stores
    length: tokens of each row that have been folded into the bodies
    filled: tokens in the tails; one number for all rows, or one per row
    tail_size: capacity of the tails in tokens
    """

    slots: tuple[Slot, ...]
    states: tuple[Written, ...]
    length: Int[Array, " batch"]
    filled: Int[Array, "*row"]
    tail_size: int = field(metadata={"static": True})

    def by_row(self) -> Cache:
        """Return the cache with the number of tokens in the tail counted for each row, as steps
        that keep the tokens of some rows only need it."""
        return replace(self, filled=jnp.broadcast_to(self.filled, self.length.shape))

    def position(self) -> Int[Array, " batch"]:
        """Return the position of the next token of each row."""
        return self.length + self.filled

    def split(self) -> tuple[Any, Any]:
        """Split the cache into arrays that a decode loop only reads (bodies, lengths) and arrays
        that its steps write (tails, states), which the loop carries."""
        bodies = tuple(replace(slot, tail=None) for slot in self.slots)
        tails = tuple(slot.tail for slot in self.slots)
        frozen = replace(self, slots=bodies, states=None, filled=None)
        return frozen, (tails, self.states, self.filled)

    @classmethod
    def join(cls, frozen: Any, live: Any) -> Cache:
        """Return the cache from the two results of `split`."""
        tails, states, filled = live
        slots = tuple(
            replace(slot, tail=tail) for slot, tail in zip(frozen.slots, tails, strict=True)
        )
        return replace(frozen, slots=slots, states=states, filled=filled)

    def nbytes(self) -> int:
        """Return the allocated bytes; for abstract arrays, those that they would take."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Ring(AllRead):
    """A ring buffer: the entry of position p is in slot p modulo capacity.

    A ring of a full cache never wraps, one of a window does. Positions are computed from the number
    of entries and not stored.

    tensors: [batch heads slot width] by name. wraps: whether there may be more entries than slots.
    """

    tensors: SlotArrays
    wraps: bool = field(metadata={"static": True})

    @property
    def needs_queries(self) -> bool:
        return False

    def entries(self, length: Int[Array, " batch"]) -> Entries:
        return body_entries(self.tensors, length, self.wraps)

    def extended(
        self,
        new: SlotArrays,
        length: Int[Array, " batch"],
        added: Int[Array, " batch"],
        reader: Reader,
        fresh: bool = False,
    ) -> Ring:
        return Ring(fold(self.tensors, new, length, added), self.wraps)


def ring_position(length: Int[Array, " batch"], capacity: int) -> Int[Array, "batch slot"]:
    """Return the position of the entry in each slot of a ring after `length` entries; negative for
    an empty slot.

    It is the largest p < length with p = slot modulo capacity.
    """
    newest = length[:, None] - 1
    return newest - (newest - jnp.arange(capacity)[None]) % capacity


def body_entries(tensors: SlotArrays, length: Int[Array, " batch"], wraps: bool) -> Entries:
    """Return the entries of a ring. wraps: `length` may be larger than the number of slots."""
    capacity = next(iter(tensors.values())).shape[2]
    position = ring_position(length, capacity)[:, None]
    return Entries(tensors, position, valid=position >= 0, ordered=not wraps)


def tail_entries(
    tensors: Tail, length: Int[Array, " batch"], filled: Int[Array, "*row"]
) -> Entries:
    """Return the first `filled` entries of a tail, of which the first has position `length`."""
    tensors = {name: tensor for name, tensor in tensors.items() if name != QUERY}
    place = jnp.arange(next(iter(tensors.values())).shape[2])[None, None]
    position = length[:, None, None] + place
    return Entries(
        tensors, position, valid=jnp.broadcast_to(place < filled.reshape(-1, 1, 1), position.shape)
    )


def append(tail: Tail, new: Token, filled: Int[Array, ""]) -> Tail:
    """Write the entry of one token to place `filled` of the tail, the same in all rows.

    The query goes to this place modulo the number of its places, which may be fewer.
    """

    def one(name: str, old: Array) -> Array:
        place = filled % old.shape[2] if name == QUERY else filled
        fresh = new[name].astype(old.dtype)
        return jax.lax.dynamic_update_slice_in_dim(old, fresh, place, axis=2)

    return {name: one(name, old) for name, old in tail.items()}


def append_some(
    tail: Tail, new: Token, filled: Int[Array, " batch"], which: Bool[Array, " batch"]
) -> Tail:
    """Write the entry of one token to place `filled` of each row's tail, in the rows `which`; the
    query as in `append`.
    """
    rows = jnp.arange(len(filled))

    def one(name: str, old: Array, fresh: Array) -> Array:
        place = filled % old.shape[2] if name == QUERY else filled
        # A place beyond the tail is dropped by mode="drop", so that the row is not written.
        place = jnp.where(which, place, old.shape[2])
        return old.at[rows, :, place].set(fresh[:, :, 0].astype(old.dtype), mode="drop")

    return {name: one(name, tail[name], new[name]) for name in tail}


def fold(
    body: SlotArrays,
    new: Tail,
    length: Int[Array, " batch"],
    added: Int[Array, " batch"],
) -> SlotArrays:
    """Return the ring after the first `added` entries of `new` were written to each row.

    length: number of entries written to the ring before

    The position that each slot must hold afterwards is computed. An entry at a new position is
    gathered from `new`; other slots are unchanged. The same rule holds for rows of different
    lengths and for rings that wrap.
    """

    def one(old: Array, fresh: Array) -> Array:
        position = ring_position(length + added, old.shape[2])
        source = position - length[:, None]
        index = jnp.clip(source, 0, fresh.shape[2] - 1)[:, None, :, None]
        taken = jnp.take_along_axis(fresh.astype(old.dtype), index, axis=2)
        return jnp.where((source >= 0)[:, None, :, None], taken, old)

    return {name: one(body[name], new[name]) for name in body}
