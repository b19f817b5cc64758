"""Read policies: choose the entries that a query reads. The default reads all.

All entries stay allocated, but fewer are read: an index that is built with the body is compared
with the query of a decode step, and the chosen entries are gathered. All query heads of a store
read the same entries: each head distributes a weight of 1 over entries (or pages, or clusters), and
the sums of these weights decide. The first tokens, recent tokens and the tail are always read.
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
"""Number of first tokens that are always read."""
RECENT = 8
"""Number of newest tokens of a body that are always read."""

Index = Mapping[str, Array]


@dataclass(frozen=True)
class View:
    """A body from which an index is built.

    key: keys in the decoding form, pieces concatenated
    length: tokens read so far
    before: the previous index
    fresh: whether the body was empty before
    """

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
        """Return the entries that every query reads."""
        position = self.entries.position
        recent = position >= self.length[:, None, None] - RECENT
        return self.there & ((position < SINKS) | recent)


@dataclass(frozen=True)
class Select:
    """Base class of read policies.

    budget: number of entries that a query reads, or their fraction of the body's capacity
    """

    budget: CacheBudget = field(default_factory=CacheBudget)

    has_budget: ClassVar[bool] = True
    skips_keys: ClassVar[bool] = True
    """Whether some keys are not read at all."""
    orders: ClassVar[bool] = False
    """Whether the policy sorts the body, for each store."""

    @property
    def run(self) -> int:
        """Number of slots that are read together."""
        return 1

    @property
    def minimum(self) -> int:
        """Smallest number of entries that a budget may allow: the entries that are always read, and
        one more.
        """
        return SINKS + RECENT + 1

    def sized(self, slots: int) -> Select:
        """Return this policy with defaults filled in for a body of this size."""
        return self

    def order(self, view: View) -> tuple[Int[Array, "batch stores slot"], View]:
        """Return the order of the entries in the body, and the view from which `index` is built.
        Called only if `orders` is true.
        """
        raise NotImplementedError

    def index(self, view: View) -> dict[str, Array]:
        """Build the index beside the body."""
        return {}

    def retrieve(self, shelf: Shelf, index: Index, query: Query, recall: Recall) -> Retrieved:
        """Return the keys and values of the body that one query token reads."""
        raise NotImplementedError


@dataclass(frozen=True)
class All(Select):
    """Read all entries."""

    has_budget: ClassVar[bool] = False
    skips_keys: ClassVar[bool] = False

    def retrieve(self, shelf: Shelf, index: Index, query: Query, recall: Recall) -> Retrieved:
        return shelf.whole(recall)


def joined(query: Query) -> Float[Array, "batch heads group width"]:
    """Concatenate the pieces of the query of one token."""
    return jnp.concatenate(query, axis=-1)[:, :, :, 0]


def shares(
    logits: Float[Array, "batch heads group choice"], allowed: Bool[Array, "batch stores choice"]
) -> Float[Array, "batch stores choice"]:
    """Sum the softmax of each head of a store over the allowed choices."""
    batch, stores, choices = allowed.shape
    of_store = logits.reshape(batch, stores, -1, choices)
    given = jax.nn.softmax(jnp.where(allowed[:, :, None], of_store, -1e30), axis=-1)
    return jnp.sum(jnp.where(allowed[:, :, None], given, 0.0), axis=2)


def best(
    wanted: Float[Array, "batch stores choice"],
    always: Bool[Array, "batch stores choice"],
    number: int,
) -> Int[Array, "batch stores chosen"]:
    """Return the indices of the `number` choices with the largest weights, ascending."""
    _, index = jax.lax.top_k(jnp.where(always, jnp.inf, wanted), number)
    return jnp.sort(index, axis=-1)
