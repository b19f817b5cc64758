"""A cache is a bag of entries, each with its position.

What a token leaves behind for later queries: named tensors (keys and values, or a latent, or
values alone), its position, whether it is there at all, and its document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import jax

from mukv.attention.recalled import Query, Recalled
from mukv.core.typing import Array, Bool, Float, Int


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Entries:
    """tensors: by name, [batch heads key width]: exactly what a cache must keep.
    position: place in the document, [batch 1 key], or per KV head where they keep different ones.
    valid: which of the places hold an entry; None for all.
    segment: document within the row; None where there is one document per row.
    ordered: entries stand in the order of their positions (a ring that wraps does not).
    window: tokens within which a query sees these entries, itself included; None for all.
    every: tokens per entry.
    """

    tensors: dict[str, Float[Array, "batch _ key _"]]
    position: Int[Array, "batch #kv_heads key"]
    valid: Bool[Array, "batch #kv_heads key"] | None = None
    segment: Int[Array, "batch #kv_heads key"] | None = None
    ordered: bool = field(default=True, metadata={"static": True})
    window: int | None = field(default=None, metadata={"static": True})
    every: int = field(default=1, metadata={"static": True})

    def retrieve(self, query: Query, recall: Recall) -> Retrieved:
        """What a query finds here: all there is."""
        return recall(self), self


Recall = Callable[[Entries], Recalled]
Retrieved = tuple[Recalled, Entries]
"""Keys and values that a query is to read, and where they stand."""


@runtime_checkable
class Bag(Protocol):
    """What `read` takes: entries, or what shows each query those that it looks for."""

    def retrieve(self, query: Query, recall: Recall) -> Retrieved:
        """query: scaled, in the pieces that recalled keys have."""
        ...
