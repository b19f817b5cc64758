"""Encoded entries of a body with their positions, and functions that read all or some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import no_type_check

import jax
import jax.numpy as jnp

from mukv.attention import Entries, Query, Recall, Recalled, Retrieved
from mukv.attention.recalled import Dense, Forwarding, Whole
from mukv.attention.stored import Coded, StoredForm
from mukv.cache.store import Parts, Store, Stored, rows, runs
from mukv.core.typing import Array, Bool, Float, Int
from mukv.position.base import Logits

BLOCK = 512
"""Number of slots that are decoded at once, so that the result stays in the processor's cache. On
two cores reading int8 takes 1.0 times as long as reading float32, and 2.4 times with blocks of
4,096 slots.
"""
NOWHERE = -1
"""Position of an empty slot."""


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shelf:
    """Entries in their stored form.

    stored: encoded arrays by name of tensor
    position: position of each slot, per store; `NOWHERE` if empty
    owner: head that an entry belongs to, where heads share one store; None where they don't
    store: encoding
    widths: names and widths of the tensors
    keys: names of the tensors that are keys
    heads: number of key heads that queries are grouped by
    """

    stored: Stored
    position: Int[Array, "batch stores slot"]
    owner: Int[Array, "batch 1 slot"] | None
    store: Store = field(metadata={"static": True})
    widths: tuple[tuple[str, int], ...] = field(metadata={"static": True})
    keys: tuple[str, ...] = field(metadata={"static": True})
    heads: int = field(metadata={"static": True})

    @property
    def slots(self) -> int:
        return self.position.shape[-1]

    def there(self) -> Bool[Array, "batch heads slot"]:
        """Return which slots are in use, per store, or per head where heads share one."""
        there = self.position != NOWHERE
        if self.owner is None:
            return there
        return there & (self.owner == jnp.arange(self.heads)[None, :, None])

    def entries(self) -> Entries:
        """Return all entries, decoded into a copy if necessary."""
        return self._entries(self.stored, self.position, self.there())

    def whole(self, recall: Recall) -> tuple[Recalled, Entries]:
        """Return all entries; a blockwise encoding is decoded block by block when they are read."""
        if not self.store.blockwise or self.slots <= BLOCK:
            entries = self.entries()
            return recall(entries), entries
        recalled = InBlocks(
            self.slots,
            lambda start, size: recall(self._range(start, size)),
            partial(self.form, recall),
        )
        return recalled, Entries({}, self.position, self.there())

    def read_runs(
        self, index: Int[Array, "batch stores run"], length: int, recall: Recall
    ) -> Retrieved:
        """Return the entries of some runs, as `runs` does, with their keys and values. A kernel
        reads them where they are stored, without a copy.
        """
        entries = self.runs(index, length)
        return Gathered(recall(entries), partial(self.form, recall, index, length)), entries

    def form(
        self,
        recall: Recall,
        index: Int[Array, "batch stores run"] | None = None,
        length: int = 1,
    ) -> StoredForm | str:
        """Return keys and values as they are stored, or why a kernel can't decode them.

        recall: must return stored tensors unchanged; which ones is found without computing any
        index, length: runs that are read, as in `runs`; None for all slots
        """
        if not self.store.in_kernels:
            return f"{type(self.store).__name__.lower()} is not decoded in a kernel"
        found: list[list[str]] = []

        def named(entries: Entries) -> None:
            names = {id(tensor): name for name, tensor in entries.tensors.items()}
            recalled = recall(entries)
            if isinstance(recalled, Dense):
                tensors = (*recalled.keys, recalled.value)
                found.append([names.get(id(tensor), "") for tensor in tensors])

        jax.eval_shape(lambda: named(self.entries()))
        if not found or not all(found[0]):
            return "keys or values are computed from what is stored"
        widths = dict(self.widths)

        def coded(name: str) -> Coded:
            decode = partial(self.store.decode_block, name in self.keys)
            return Coded(self.stored[name], self.slots, widths[name], decode)

        known = {name: coded(name) for name in found[0]}
        *keys, value = (known[name] for name in found[0])
        position = self.position if index is None and self.owner is None else None
        return StoredForm(tuple(keys), value, index, length, position)

    def runs(self, index: Int[Array, "batch stores run"], length: int = 1) -> Entries:
        """Gather the entries of some runs of `length` slots.

        index: index of each run; run i starts at slot i * length
        """
        slot = (index[..., None] * length + jnp.arange(length)[None, None, None]).reshape(
            *index.shape[:2], -1
        )
        position = jnp.take_along_axis(self.position, slot, axis=2)
        taken = {
            name: runs(parts, self.slots, index, length) for name, parts in self.stored.items()
        }
        return self._entries(taken, position, position != NOWHERE)

    def _range(self, start: Int[Array, ""] | int, size: int) -> Entries:
        def cut(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, size, axis=2)

        stored = {name: rows(parts, self.slots, start, size) for name, parts in self.stored.items()}
        return self._entries(stored, cut(self.position), cut(self.there()))

    def _entries(self, stored: dict[str, Parts], position: Array, there: Array) -> Entries:
        decode = self.store.decode
        tensors = {
            name: decode(name in self.keys, stored[name], width) for name, width in self.widths
        }
        return Entries(tensors, position, there)


@dataclass(frozen=True)
class InBlocks(Recalled):
    """Keys and values that are decoded block by block, for products and again for mixtures.

    Elsewhere than on a CPU all are decoded at once, in the kernels that read them: a loop of small
    blocks starts some 10 kernels for each.
    """

    slots: int
    block: Callable[[Int[Array, ""] | int, int], Recalled]
    form: Callable[[], StoredForm | str]

    def products(self, query: Query) -> Logits:
        return jax.lax.platform_dependent(query, cpu=self._products, default=self._all_products)

    def mixture(self, weights: Logits) -> Float[Array, "batch kv_heads group query width"]:
        return jax.lax.platform_dependent(weights, cpu=self._mixture, default=self._all_mixture)

    def _all_products(self, query: Query) -> Logits:
        found = self.block(0, self.slots)
        if query[0].shape[3] > 1 or not isinstance(found, Dense):
            return found.products(query)
        # Sums of single products, into which XLA fuses decoding; it writes the operands of a
        # matrix product to memory in float32 first.
        pairs = zip(query, found.keys, strict=True)
        return sum(
            (jnp.sum(q[..., None, :] * k[:, :, None, None], axis=-1) for q, k in pairs),
            start=jnp.zeros((), jnp.float32),
        )

    def _all_mixture(self, weights: Logits) -> Float[Array, "batch kv_heads group query width"]:
        found = self.block(0, self.slots)
        if weights.shape[3] > 1 or not isinstance(found, Dense):
            return found.mixture(weights)
        return jnp.sum(weights[..., None] * found.value[:, :, None, None], axis=-2)

    def _products(self, query: Query) -> Logits:
        def each(start: Array) -> Logits:
            return self.block(start, BLOCK).products(query)

        full = self.slots // BLOCK
        blocks = jnp.moveaxis(jax.lax.map(each, jnp.arange(full) * BLOCK), 0, 4)
        products = blocks.reshape(*blocks.shape[:4], full * BLOCK)
        if rest := self.slots % BLOCK:
            last = self.block(full * BLOCK, rest).products(query)
            products = jnp.concatenate([products, last], axis=-1)
        return products

    def _mixture(self, weights: Logits) -> Float[Array, "batch kv_heads group query width"]:
        def add(total: Array, start: Array) -> tuple[Array, None]:
            share = jax.lax.dynamic_slice_in_dim(weights, start, BLOCK, axis=4)
            return total + self.block(start, BLOCK).mixture(share), None

        full, rest = self.slots // BLOCK, self.slots % BLOCK
        total = jnp.zeros((*weights.shape[:4], self.width))
        total, _ = jax.lax.scan(add, total, jnp.arange(full) * BLOCK)
        if rest:
            last = jax.lax.slice_in_dim(weights, full * BLOCK, self.slots, axis=4)
            total = total + self.block(full * BLOCK, rest).mixture(last)
        return total

    def dense(self, heads: int) -> tuple[Whole, Whole]:
        return self.block(0, self.slots).dense(heads)

    def stored(self) -> StoredForm | str:
        return self.form()

    @property
    def width(self) -> int:
        return self.block(0, BLOCK).width


@dataclass(frozen=True)
class Gathered(Forwarding):
    """Keys and values of some runs of slots, gathered; `form` tells where they are stored."""

    form: Callable[[], StoredForm | str]

    def stored(self) -> StoredForm | str:
        return self.form()
