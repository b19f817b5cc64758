"""Sparse V: read all keys, but only the values with the largest attention weights.

The weight of the other values is shared out among those that are read, in proportion to their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.attention import Query, Recall, Recalled, Retrieved
from mukv.attention.recalled import Whole
from mukv.cache.select import Index, Select
from mukv.cache.shelf import Shelf
from mukv.core.errors import BadInput
from mukv.core.tap import tap
from mukv.core.typing import Array, Float, Int
from mukv.position.base import Logits

CAPPED = "capped"
"""Name of a tap: whether the budget was exhausted before the mass was reached, [batch store]."""


@dataclass(frozen=True)
class TopK(Select):
    """Read the values of the `budget` largest weights.

    renormalise: whether the weights of the values that are read are scaled up, so that their sum is
        the weight of the whole body
    """

    renormalise: bool = True

    skips_keys: ClassVar[bool] = False

    @property
    def minimum(self) -> int:
        return 1

    def retrieve(self, shelf: Shelf, index: Index, query: Query, recall: Recall) -> Retrieved:
        def values(slots: Int[Array, "batch stores chosen"]) -> Recalled:
            return recall(shelf.runs(slots))

        whole, entries = shelf.whole(recall)
        number = max(self.budget.of(shelf.slots), 1)
        stores = shelf.position.shape[1]
        return Heaviest(whole, values, stores, number, self._mass(), self.renormalise), entries

    def _mass(self) -> float:
        return 1.0


@dataclass(frozen=True)
class TopP(TopK):
    """Read the fewest values whose weights sum to `mass` of the body's total weight, at most
    `budget`.

    mass: share of the attention weights, 0 to 1
    """

    mass: float = 0.95

    def __post_init__(self) -> None:
        if not 0 < self.mass <= 1:
            raise BadInput("mass", self.mass, "a share above 0 and at most 1")

    def _mass(self) -> float:
        return self.mass


@dataclass(frozen=True)
class Heaviest(Recalled):
    """All keys, and values gathered by weight.

    values: function that gathers the values of some slots
    stores: number of stores
    number: maximum number of values that are read
    mass: fraction of the total weight at which reading, in order of falling weight, stops
    renormalise: whether the weights of the values that are read are scaled to the sum of all
        weights, per query head
    """

    whole: Recalled
    values: Callable[[Int[Array, "batch stores chosen"]], Recalled]
    stores: int
    number: int
    mass: float
    renormalise: bool

    def products(self, query: Query) -> Logits:
        return self.whole.products(query)

    def mixture(self, weights: Logits) -> Float[Array, "batch kv_heads group query width"]:
        batch, heads, _, _, slots = weights.shape
        by_store = jnp.sum(weights.reshape(batch, self.stores, -1, slots), axis=2)
        given, index = jax.lax.top_k(by_store, self.number)
        if self.mass < 1:
            before = jnp.cumsum(given, axis=-1) - given
            limit = self.mass * jnp.sum(by_store, axis=-1, keepdims=True)
            tap(CAPPED, jnp.sum(given, axis=-1) < limit[..., 0])
            given = jnp.where(before < limit, given, 0.0)
        of_head = jnp.repeat(index, heads // self.stores, axis=1)[:, :, None, None]
        taken = jnp.take_along_axis(weights, of_head, axis=4)
        read = jnp.repeat(given > 0, heads // self.stores, axis=1)[:, :, None, None]
        taken = jnp.where(read, taken, 0.0)
        if self.renormalise:
            whole, part = (jnp.sum(x, axis=4, keepdims=True) for x in (weights, taken))
            # A head of whose weights none is read keeps its zeros.
            taken = taken * (whole / jnp.where(part > 0, part, 1.0))
        return self.values(index).mixture(taken)

    def dense(self, heads: int) -> tuple[Whole, Whole]:
        return self.whole.dense(heads)

    @property
    def width(self) -> int:
        return self.whole.width
