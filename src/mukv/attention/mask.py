"""Attention masks computed from positions: causality, windows, documents, validity.

A query at position p sees a valid entry at position j of the same document if and only if p -
window < j <= p, and p <= until if the entry was dropped after position `until`. Rings, padding,
packed documents and eviction need no other rule.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mukv.attention.entries import Entries
from mukv.core.typing import Array, Bool, Int


@dataclass(frozen=True)
class Mask:
    """Which entries each query may attend to.

    segment: number of the document of each query; None where there is one document per row
    window: tokens that a query sees, itself included; None for all
    aligned: whether entry i was written by query i, so that only entries up to the diagonal are
        visible; attention cores may rely on it
    chosen: further restriction to the entries that each query may read; None for none
    choice: places of the entries that each query reads, in layers with an indexer or that read with
        the choice of another layer (`EntryChoice` in `attention/indexer.py`). None if that is not
        known
    """

    segment: Int[Array, "batch query"] | None = None
    window: int | None = None
    aligned: bool = False
    chosen: Bool[Array, "batch #kv_heads query key"] | None = None
    choice: Int[Array, "batch query chosen"] | None = None

    def of(self, entries: Entries) -> Mask:
        """Return the mask of one bag, whose own window also limits the mask.

        The result is aligned only if the bag has one entry per token.
        """
        windows = [window for window in (self.window, entries.window) if window is not None]
        aligned = self.aligned and entries.every == 1
        return replace(self, window=min(windows, default=None), aligned=aligned)

    def visible(
        self, position: Int[Array, "batch query"], entries: Entries
    ) -> Bool[Array, "batch #kv_heads query key"]:
        """Return whether each query, at `position` in its document, sees each entry."""
        distance = position[:, None, :, None] - entries.position[:, :, None, :]
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if entries.valid is not None:
            seen &= entries.valid[:, :, None, :]
        if entries.until is not None:
            seen &= position[:, None, :, None] <= entries.until[:, :, None, :]
        if self.segment is not None and entries.segment is not None:
            seen &= self.segment[:, None, :, None] == entries.segment[:, :, None, :]
        return seen if self.chosen is None else seen & self.chosen
