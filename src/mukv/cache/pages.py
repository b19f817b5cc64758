"""Quest (Tang et al. 2024): read the pages of the body whose keys may have the largest products.

Each page has the minimum and the maximum of its keys per channel. They bound the product of a query
with any key of the page; the pages with the largest bounds are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from mukv.attention import Query, Recall, Retrieved
from mukv.cache.select import RECENT, Index, Select, View, best, joined, shares
from mukv.cache.shelf import Shelf
from mukv.core.counts import require_counts
from mukv.core.linear import similarity
from mukv.core.typing import Array

PAGE, SMALL, SHORT = 16, 4, 1024
"""Slots per page in large and in small bodies, and the number of slots below which a body
is small.
"""


@dataclass(frozen=True)
class Pages(Select):
    """Read the pages with the largest bounds (Quest, Tang et al. 2024).

    size: slots per page; None means 16, or 4 in bodies of fewer than 1,024 slots
    """

    size: int | None = None

    def __post_init__(self) -> None:
        require_counts(self, "size", most=1 << 20)

    @property
    def run(self) -> int:
        return self.size or PAGE

    @property
    def minimum(self) -> int:
        # The first page, the pages of recent tokens (which may begin within a page), and one more.
        return self.run * (1 + -(-(RECENT - 1) // self.run) + 1 + 1)

    def sized(self, slots: int) -> Pages:
        return replace(self, size=self.size or (PAGE if slots >= SHORT else SMALL))

    def index(self, view: View) -> dict[str, Array]:
        batch, heads, slots, width = view.key.shape
        stores = view.there.shape[1]
        there = jnp.repeat(view.there, heads // stores, axis=1)[..., None]
        paged = (batch, heads, slots // self.run, self.run, width)
        low = jnp.min(jnp.where(there, view.key, jnp.inf).reshape(paged), axis=3)
        high = jnp.max(jnp.where(there, view.key, -jnp.inf).reshape(paged), axis=3)
        bounds = (jnp.where(jnp.isfinite(x), x, 0.0) for x in (high, low))
        return {
            "bounds": jnp.concatenate(list(bounds), axis=-1).astype(view.key.dtype),
            "always": view.always().reshape(batch, stores, -1, self.run).any(axis=-1),
            "used": view.there.reshape(batch, stores, -1, self.run).any(axis=-1),
        }

    def retrieve(self, shelf: Shelf, index: Index, query: Query, recall: Recall) -> Retrieved:
        whole = joined(query)
        # The larger of q low and q high is q+ high + q- low: one product for all pages.
        signs = jnp.concatenate([jnp.maximum(whole, 0), jnp.minimum(whole, 0)], axis=-1)
        bounds = similarity(signs, index["bounds"])
        number = -(-self.budget.of(shelf.slots) // self.run)
        pages = best(shares(bounds, index["used"]), index["always"], number)
        return shelf.read_runs(pages, self.run, recall)
