"""Quest (Tang et al. 2024): the body in pages; beside each the least and the largest number of its
keys, by channel. They bound what a query's product with any key of the page can be, and the
pages with the largest bounds are read.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax.numpy as jnp

from mukv.attention import Query, Recall, Retrieved
from mukv.cache.select import RECENT, Index, Select, View, best, joined, shares
from mukv.cache.shelf import Shelf
from mukv.core.linear import similarity
from mukv.core.typing import Array

PAGE, SMALL, SHORT = 16, 4, 1024


@dataclass(frozen=True)
class Pages(Select):
    """size: slots per page; 16 if None, 4 in bodies of fewer than 1,024."""

    size: int | None = None

    @property
    def run(self) -> int:
        return self.size or PAGE

    @property
    def minimum(self) -> int:
        # The first page, those of recent tokens, which may begin at a page's edge, and one.
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
        entries = shelf.runs(pages, self.run)
        return recall(entries), entries
