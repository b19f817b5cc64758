"""Entries of a cache: the tensors that tokens write for later queries, each with a position.

An entry has named tensors (keys and values, a latent, or values alone), its position, whether it is
valid, and its document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from mukv.attention.recalled import Query, Recalled
from mukv.core.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entries:
    """A bag of entries. Masks are computed from its fields.

    tensors: stored tensors by name, each [batch heads key width]
    position: position in the document, [batch 1 key], or per KV head where heads keep different
        entries
    valid: which slots hold an entry; None for all
    segment: number of the document within the row; None where there is one document per row
    ordered: whether entries lie in the order of their positions (false for a ring that has wrapped)
    window: tokens within which a query sees these entries, itself included; None for all
    every: tokens per entry
    until: position of the last query that may see the entry, as in training with a policy that
        drops entries; None for no last query
    """

    tensors: dict[str, Float[Array, "batch _ key _"]]
    position: Int[Array, "batch #kv_heads key"]
    valid: Bool[Array, "batch #kv_heads key"] | None = None
    segment: Int[Array, "batch #kv_heads key"] | None = None
    ordered: bool = field(default=True, metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})
    every: int = field(default=1, metadata={"static": True})
    until: Int[Array, "batch #kv_heads key"] | None = None

    def retrieve(self, query: Query, recall: Recall) -> Retrieved:
        """Return the keys and values of all entries; every query reads the same ones."""
        return recall(self), self

    def taken(self, place: Int[Array, "batch 1 number"]) -> Entries:
        """Gather the entries at these places."""

        def pick(array: Array | None) -> Array | None:
            return None if array is None else jnp.take_along_axis(array, place, 2, mode="clip")

        tensors = {
            name: jnp.take_along_axis(tensor, place[..., None], 2, mode="clip")
            for name, tensor in self.tensors.items()
        }
        of_entries = ("position", "valid", "segment", "until")
        picked = {name: pick(getattr(self, name)) for name in of_entries}
        return replace(self, tensors=tensors, ordered=False, **picked)


Recall = Callable[[Entries], Recalled]
"""Function that computes keys and values of entries."""
Retrieved = tuple[Recalled, Entries]
"""Keys and values that a query reads, and the entries that give their positions and validity."""


@runtime_checkable
class Bag(Protocol):
    """Argument of `read`: entries, or a store that selects the entries for each query."""

    def retrieve(self, query: Query, recall: Recall) -> Retrieved:
        """Return the keys and values that this query reads.

        query: scaled queries, in the pieces that recalled keys have. recall: computes keys and
            values.
        """
        ...

    def taken(self, place: Int[Array, "batch 1 number"]) -> Entries | None:
        """Gather the entries at these places, among those that `retrieve` returns; None if these
        differ between queries.
        """
        ...
