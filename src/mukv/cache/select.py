"""Which entries a query reads: the contract, and the answer "all of them".

The memory stays, reads shrink: beside the body lies an index, made when the body was; a step's
query looks at it and has what it chose gathered. One choice serves all query heads of a store:
each gives every entry (or page, or cluster) a share of 1, and the shares are added up. First
tokens and recent ones are always read, as is the tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.attention import Entries, Query, Recall, Retrieved
from mukv.cache.budget import CacheBudget
from mukv.cache.shelf import Shelf
from mukv.core.typing import Array, Bool, Float, Int

SINKS = 4
"""First tokens that are always read."""
RECENT = 8
"""Newest tokens of a body that are always read."""

Index = Mapping[str, Array]


@dataclass(frozen=True)
class View:
    """A body as it is to be indexed. key: pieces joined, as the decoding form has them. length:
    tokens read. before: the index that it had. fresh: nothing was in it before."""

    key: Float[Array, "batch heads slot width"]
    value: Float[Array, "batch heads slot value_width"]
    entries: Entries
    length: Int[Array, " batch"]
    before: Index
    fresh: bool

    @property
    def there(self) -> Bool[Array, "batch stores slot"]:
        assert self.entries.valid is not None
        return self.entries.valid

    def always(self) -> Bool[Array, "batch stores slot"]:
        """Entries that every query reads."""
        position = self.entries.position
        recent = position >= self.length[:, None, None] - RECENT
        return self.there & ((position < SINKS) | recent)


@dataclass(frozen=True)
class Select:
    """budget: of the entries that a body has room for."""

    budget: CacheBudget = field(default_factory=CacheBudget)

    skips_keys: ClassVar[bool] = True
    """Whether some keys are not read at all."""
    orders: ClassVar[bool] = False
    """Whether the body is put in an order of its own, for each store."""

    @property
    def run(self) -> int:
        """Slots that are read together."""
        return 1

    @property
    def minimum(self) -> int:
        """Entries that a budget must hold: those that are always read, and one."""
        return SINKS + RECENT + 1

    def sized(self, slots: int) -> Select:
        """The same with nothing left open, for a body of this size."""
        return self

    def order(self, view: View) -> tuple[Int[Array, "batch stores slot"], View]:
        """In which the body's slots are to be filled, where it `orders`; what `index` needs."""
        raise NotImplementedError

    def index(self, view: View) -> dict[str, Array]:
        """What lies beside the body."""
        return {}

    def retrieve(self, shelf: Shelf, index: Index, query: Query, recall: Recall) -> Retrieved:
        """What the query of one token reads of the body."""
        raise NotImplementedError


@dataclass(frozen=True)
class All(Select):
    """All of them."""

    skips_keys: ClassVar[bool] = False

    def retrieve(self, shelf: Shelf, index: Index, query: Query, recall: Recall) -> Retrieved:
        return shelf.whole(recall)


def joined(query: Query) -> Float[Array, "batch heads group width"]:
    """The query of one token, its pieces as those of keys are joined."""
    return jnp.concatenate(query, axis=-1)[:, :, :, 0]


def shares(
    logits: Float[Array, "batch heads group choice"], allowed: Bool[Array, "batch stores choice"]
) -> Float[Array, "batch stores choice"]:
    """How much the heads of a store want each choice, together; each has 1 to give."""
    batch, stores, choices = allowed.shape
    of_store = logits.reshape(batch, stores, -1, choices)
    given = jax.nn.softmax(jnp.where(allowed[:, :, None], of_store, -1e30), axis=-1)
    return jnp.sum(jnp.where(allowed[:, :, None], given, 0.0), axis=2)


def best(
    wanted: Float[Array, "batch stores choice"],
    always: Bool[Array, "batch stores choice"],
    number: int,
) -> Int[Array, "batch stores chosen"]:
    """The `number` most wanted choices, in their order."""
    _, index = jax.lax.top_k(jnp.where(always, jnp.inf, wanted), number)
    return jnp.sort(index, axis=-1)
