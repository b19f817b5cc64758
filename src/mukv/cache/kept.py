"""The body of a layer under a policy: its stored entries and the state of the policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, TypeVar, no_type_check

import jax
import jax.numpy as jnp

from mukv.attention import Attention, Bag, Entries, Query, Recall, Retrieved
from mukv.attention.mixer import ENTRIES
from mukv.cache.base import Reader, SlotArrays
from mukv.cache.keep import Chosen, Everything, Keep
from mukv.cache.seen import Seen
from mukv.cache.select import All, Select, View
from mukv.cache.shelf import NOWHERE, Shelf
from mukv.cache.store import Exact, Store
from mukv.core.params import abstract
from mukv.core.typing import Array, Bool, Float, Int

T = TypeVar("T")
EXACT = Exact()
LAST = jnp.iinfo(jnp.int32).max


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Kept:
    """Body of one layer under a policy.

    shelf: the stored entries
    carried: accumulated score of each entry; None if the policy does not accumulate scores
    notes: state of the eviction policy
    index: index of the read policy
    keep, select: eviction policy and read policy
    held: whether nothing is dropped any more, as after the prompt under `hold`
    """

    shelf: Shelf
    carried: Float[Array, "batch stores slot"] | None
    notes: dict[str, Array]
    index: dict[str, Array]
    keep: Keep = field(metadata={"static": True})
    select: Select = field(metadata={"static": True})
    held: bool = field(default=False, metadata={"static": True})

    @property
    def needs_queries(self) -> bool:
        return self.last_queries != 0 or self.shelf.store.needs_queries

    @property
    def last_queries(self) -> int | None:
        # A store uses the queries of a prompt, which no tail has.
        return self.keep.last_queries if self.keep.needs_queries and not self.held else 0

    @property
    def by_query(self) -> bool:
        return not isinstance(self.select, All)

    def bag(self, length: Int[Array, " batch"]) -> Bag:
        return self

    def entries(self, length: Int[Array, " batch"]) -> Entries:
        return self._seen(self.shelf.entries())

    @property
    def limits(self) -> bool:
        """Whether queries may see fewer entries than are stored."""
        return self.keep.limits and not self.held

    def limited(self, newest: Entries) -> tuple[Kept, Entries]:
        if not self.limits or self.carried is None:
            return self, newest
        given = self.carried, self.shelf.position, self.shelf.there(), newest
        carried, newest = self.keep.decided(*given)
        return replace(self, carried=carried), newest

    def _seen(self, entries: Entries) -> Entries:
        """Return all entries of the body with the last query that may see each."""
        if not self.limits or self.carried is None:
            return entries
        return replace(entries, until=self.keep.until(self.carried, entries.position))

    def for_steps(self) -> Kept:
        if self.limits:
            return replace(self, notes={})
        return replace(self, carried=None, notes={}, keep=Everything(), held=False)

    def retrieve(self, query: Query, recall: Recall) -> Retrieved:
        """Return the keys and values that one query token reads."""
        recalled, entries = self.select.retrieve(self.shelf, self.index, query, recall)
        return recalled, self._seen(entries)

    def taken(self, place: Int[Array, "batch 1 number"]) -> Entries | None:
        return None if self.by_query else replace(self.shelf.runs(place), ordered=False)

    def extended(
        self,
        new: SlotArrays,
        length: Int[Array, " batch"],
        added: Int[Array, " batch"],
        reader: Reader,
        fresh: bool = False,
    ) -> Kept:
        """Merge new entries in the order of positions, and keep those that the eviction policy
        chooses, or all of them if nothing is dropped any more.
        """
        candidates = self._shelved(new, length, added)
        if not fresh:
            candidates = self._sorted(self._after(candidates))
        read = length + added
        if self.held:
            slots = jnp.broadcast_to(jnp.arange(self.shelf.slots), self.shelf.position.shape)
            kept = candidates._taken(slots)._indexed(read, reader, fresh)
            return kept._encoded(self, reader, length, added)
        entries = candidates.shelf.entries()
        number = self._number(read, candidates)
        seen = Seen(reader, entries, length, added, number, candidates.carried, self.notes)
        chosen = self.keep.chosen(seen, self.shelf.slots)
        kept = candidates._taken(chosen.index, chosen.there)
        if self.keep.merge.changes:
            kept = kept._with_values(self._merged(candidates, chosen))
        if self.keep.carries:
            carried = jnp.take_along_axis(chosen.score, chosen.index, axis=2)
            kept = replace(kept, carried=jnp.where(chosen.there, carried, 0.0))
        kept = replace(kept, notes=dict(chosen.notes), held=self.keep.when.holds)
        return kept._indexed(read, reader, fresh)._encoded(self, reader, length, added)

    def _merged(self, candidates: Kept, chosen: Chosen) -> Array:
        """Return the values of the chosen entries after the others were merged into them."""
        key, value = (candidates.shelf.stored[name]["exact"] for name in ("key", "value"))
        position, owner = candidates.shelf.position, candidates.shelf.owner
        used = position != NOWHERE
        return self.keep.merge.values(key, value, used, owner, chosen.index, chosen.there)

    def _with_values(self, value: Array) -> Kept:
        stored = {**self.shelf.stored, "value": {"exact": value}}
        return replace(self, shelf=replace(self.shelf, stored=stored))

    def _number(self, read: Int[Array, " batch"], among: Kept) -> Int[Array, " batch"]:
        """Return how many of these entries a store keeps, or a head where heads share one."""
        budget = jnp.maximum(self.keep.budget.number(read), self.keep.minimum)
        heads = 1 if self.shelf.owner is None else self.shelf.heads
        count = jnp.max(jnp.sum(among.shelf.position != NOWHERE, axis=-1), axis=-1) // heads
        return self.keep.when.number(budget, count, self.shelf.slots // heads)

    def _shelved(
        self, new: SlotArrays, length: Int[Array, " batch"], added: Int[Array, " batch"]
    ) -> Kept:
        """Return a body of the new entries only, not encoded."""
        stores = self.shelf.position.shape[1]
        batch, _, places, _ = next(iter(new.values())).shape
        place = jnp.arange(places)[None]
        position = jnp.where(place < added[:, None], length[:, None] + place, NOWHERE)
        position, owner = jnp.tile(position[:, None], (1, stores, 1)), None
        if self.shelf.owner is not None:
            heads = self.shelf.heads
            new = {name: x.reshape(batch, 1, heads * places, -1) for name, x in new.items()}
            position = jnp.tile(position, (1, 1, heads))
            owner = jnp.broadcast_to(jnp.repeat(jnp.arange(heads), places), position.shape)
        stored = {name: {"exact": x} for name, x in new.items()}
        carried = jnp.zeros(position.shape) if self.keep.carries else None
        shelf = Shelf(
            stored, position, owner, EXACT, self.shelf.widths, self.shelf.keys, self.shelf.heads
        )
        return replace(self, shelf=shelf, carried=carried)

    def _after(self, new: Kept) -> Kept:
        """Append new entries to the decoded old ones."""
        entries = self.shelf.entries()

        def behind(old: Array, more: Array, axis: int = 2) -> Array:
            return jnp.concatenate([old, more.astype(old.dtype)], axis=axis)

        stored = {
            name: {"exact": behind(entries.tensors[name], parts["exact"])}
            for name, parts in new.shelf.stored.items()
        }
        position = behind(self.shelf.position, new.shelf.position)
        owner = None
        if self.shelf.owner is not None and new.shelf.owner is not None:
            owner = behind(self.shelf.owner, new.shelf.owner)
        carried = new.carried
        if self.carried is not None and carried is not None:
            carried = behind(self.carried, carried)
        shelf = replace(new.shelf, stored=stored, position=position, owner=owner)
        return replace(new, shelf=shelf, carried=carried)

    def _sorted(self, among: Kept) -> Kept:
        """Sort by position, by head first where heads share a store; empty slots are last."""
        shelf = among.shelf
        used = shelf.position != NOWHERE
        place = jnp.where(used, shelf.position, LAST)
        if shelf.owner is None:
            order = jnp.argsort(place, axis=-1)
        else:
            order = jnp.lexsort((place, jnp.where(used, shelf.owner, LAST)), axis=-1)
        return among._taken(order, jnp.take_along_axis(used, order, axis=2))

    def _taken(
        self,
        index: Int[Array, "batch stores slot"],
        there: Bool[Array, "batch stores slot"] | None = None,
    ) -> Kept:
        """Gather the entries at these indices; mark those that are not `there` as empty."""

        def pick(array: Array) -> Array:
            return jnp.take_along_axis(array, index, axis=2)

        stored = {
            name: {"exact": jnp.take_along_axis(parts["exact"], index[..., None], axis=2)}
            for name, parts in self.shelf.stored.items()
        }
        position = pick(self.shelf.position)
        if there is not None:
            position = jnp.where(there, position, NOWHERE)
        owner = None if self.shelf.owner is None else pick(self.shelf.owner)
        shelf = replace(self.shelf, stored=stored, position=position, owner=owner)
        return replace(
            self, shelf=shelf, carried=None if self.carried is None else pick(self.carried)
        )

    def _indexed(self, read: Int[Array, " batch"], reader: Reader, fresh: bool) -> Kept:
        """Sort the entries as the read policy needs, and build its index."""
        if isinstance(self.select, All):
            return self
        form = reader.attention.decoding()
        entries = self.shelf.entries()
        recalled = form.recall(reader.weights, entries)
        heads = form.key_heads
        key, value = recalled.dense(heads)
        view = View(key, value, entries, read, self.index, fresh)
        kept = self
        if self.select.orders:
            order, view = self.select.order(view)
            kept = self._taken(order)
        return replace(kept, index=self.select.index(view))

    def _encoded(
        self, like: Kept, reader: Reader, length: Int[Array, " batch"], added: Int[Array, " batch"]
    ) -> Kept:
        """Encode the entries with the store and dtypes of `like`, and with the arrays that all of
        its slots share, where its rows have entries.

        length, added: entries of each row before and after them
        """
        store, used = like.shelf.store, self.shelf.position != NOWHERE
        first = (length == 0)[:, None, None, None]

        def encode(name: str, tensor: Array, old: dict[str, Array]) -> dict[str, Array]:
            # Empty slots must decode to finite numbers.
            tensor, key = jnp.where(used[..., None], tensor, 0), name in like.shelf.keys
            new = store.fitted(key, tensor, used, reader.queries, added)
            shared = {part: jnp.where(first, array, old[part]) for part, array in new.items()}
            parts = store.encode(key, store.reduced(key, tensor, shared), used) | shared
            return {part: array.astype(old[part].dtype) for part, array in parts.items()}

        stored = {
            name: encode(name, parts["exact"], like.shelf.stored[name])
            for name, parts in self.shelf.stored.items()
        }
        return replace(self, shelf=replace(self.shelf, stored=stored, store=store))


def choosing(memory: T, choose: bool) -> T:
    """Return bodies, or a cache with bodies, in which policies that keep all entries after the
    prompt (`hold`) may choose at the next read (between chunks of the prompt), or may not."""

    def told(body: Any) -> Any:
        holds = isinstance(body, Kept) and body.keep.when.holds
        return replace(body, held=not choose) if holds else body

    return jax.tree.map(told, memory, is_leaf=lambda each: isinstance(each, Kept))


def empty(
    attention: Attention,
    d_model: int,
    batch: int,
    slots: int,
    dtype: jnp.dtype,
    keep: Keep,
    store: Store,
    select: Select,
    given: Mapping[str, Array],
    bag: str = ENTRIES,
    pool: int | None = None,
    noted: Mapping[str, Array] | None = None,
) -> Kept:
    """Make a body without entries; its shapes are those of a full body.

    slots: capacity of each store, in entries
    given: arrays that the index of the read policy has from the start, such as calibrated centres
    bag: name of the mixer's store that holds these entries
    pool: slots of heads that share a store; None for those of all heads
    noted: arrays that the notes of the eviction policy have from the start; None for none
    """
    tokens = slots * attention.bags[bag].every
    written = attention.written(d_model, batch, tokens, dtype)[bag]
    heads = attention.key_heads
    shared = keep.spread.pools
    stores = attention.entry_sets if keep.evicts or not isinstance(select, All) else 1
    total = (heads * slots if pool is None else pool) if shared else slots
    position = jnp.full((batch, 1 if shared else stores, total), NOWHERE)
    stored = {}
    for name, shape in written.items():
        sizes = (batch, 1, total, shape.shape[3]) if shared else shape.shape
        zeros = jnp.zeros(sizes, dtype)
        stored[name] = {"exact": zeros}
    group = attention.heads // heads
    exact = Kept(
        shelf=Shelf(
            stored,
            position,
            jnp.zeros_like(position) if shared else None,
            EXACT,
            tuple((name, shape.shape[3]) for name, shape in written.items()),
            attention.keys,
            heads,
        ),
        carried=jnp.zeros(position.shape) if keep.carries else None,
        notes=keep.empty(batch, heads, group, attention.query_dim),
        index=dict(given),
        keep=keep,
        select=select,
    )
    index = jax.eval_shape(
        lambda weights: (
            exact._indexed(
                jnp.zeros(batch, jnp.int32), Reader(attention, weights), fresh=True
            ).index
        ),
        abstract(attention.read_params(d_model)),
    )
    zeros = {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in index.items()}

    def encoded(name: str, parts: dict[str, Array]) -> dict[str, Array]:
        shapes = parts["exact"].shape, dtype, position.shape
        made = _encoding(store, name in attention.keys, *shapes)
        return {part: jnp.zeros(about.shape, about.dtype) for part, about in made.items()}

    if store != EXACT:
        stored = {name: encoded(name, parts) for name, parts in stored.items()}
    shelf = replace(exact.shelf, stored=stored, store=store)

    def copied(arrays: Mapping[str, Array] | None) -> dict[str, Array]:
        # Prefill takes the cache as a donated argument, and the next cache needs them again.
        return {name: jnp.array(array, copy=True) for name, array in (arrays or {}).items()}

    index, notes = {**zeros, **copied(given)}, {**exact.notes, **copied(noted)}
    return replace(exact, shelf=shelf, index=index, notes=notes)


@lru_cache(maxsize=64)
def _encoding(
    store: Store, key: bool, shape: tuple[int, ...], dtype: Any, slots: tuple[int, ...]
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the arrays that a store makes of a tensor, by part; see `Store.encode`.

    Without entries all of them are zeros, which decode to finite numbers.
    """

    def made(tensor: Array, used: Array) -> dict[str, Array]:
        shared = store.fitted(key, tensor, used, None, jnp.zeros(shape[0], jnp.int32))
        return store.encode(key, store.reduced(key, tensor, shared), used) | shared

    given = jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct(slots, bool)
    return jax.eval_shape(made, *given)
