"""Base class of attention variants that take an indexer.

`choose` computes the choice of the layer's own indexer. `attend` reads by the choice in the mask,
which may be that of another layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax

from mukv.attention import cores
from mukv.attention.base import Attention
from mukv.attention.entries import Bag
from mukv.attention.indexed import REASON, IndexedRead
from mukv.attention.indexer import EntryChoice, Indexer
from mukv.attention.mask import Mask
from mukv.attention.mixer import Reported
from mukv.core.compute import Compute
from mukv.core.typing import Array, Int, Residual, Weights


class IndexedAttention(Attention):
    """Attention of which an indexer, if it has one, chooses the entries that a query reads."""

    indexer: Indexer | None
    """Field of the variant; None to read all entries, or those that another layer chooses."""

    def indexed(self, weights: Weights, parts: Sequence[Bag], mask: Mask) -> IndexedRead:
        """Return the read of entries that an indexer chooses."""
        raise NotImplementedError

    def decoding(self) -> IndexedAttention:
        return self

    def choose(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        mask: Mask,
        compute: Compute,
    ) -> EntryChoice | None:
        if self.indexer is None:
            return None
        form = self if mask.aligned else self.decoding()
        weights, x = jax.lax.stop_gradient((weights, x))
        return form.indexed(weights, parts, mask).choose(x, position, parts, compute)

    def attend(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        mask: Mask,
        compute: Compute,
    ) -> tuple[Residual, Reported]:
        """Attend to the entries of `mask.choice`; `IndexedRead.read` has the numbers that an
        indexer reports.
        """
        if self.indexer is None and mask.choice is None:
            return super().attend(weights, x, position, parts, mask, compute)
        return self.indexed(weights, parts, mask).read(x, position, parts, compute)

    def core(
        self,
        queries: int,
        compute: Compute,
        ordered: bool = True,
        shows: str | None = None,
        aligned: bool = False,
        dropped: bool = False,
        context: int = 1,
        unread: str | None = cores.UNKNOWN,
    ) -> cores.CoreChoice:
        needed = REASON if self.indexer else None
        demand = (ordered, shows or needed, aligned, dropped, context, unread)
        return super().core(queries, compute, *demand)
