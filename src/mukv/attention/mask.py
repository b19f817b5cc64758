"""Who may read what, computed from positions: causality, windows, segments, validity.

A query at position p in segment s sees a valid entry at position j of the same segment iff
p - window < j <= p. Rings, padding, packed documents and eviction all come down to this line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from mukv.attention.entries import Entries
from mukv.core.typing import Array, Bool, Int


@dataclass(frozen=True)
class Mask:
    """segment: document of each query, or None where there is one document per row.
    window: tokens that a query sees, itself included; None for all.
    aligned: entry number i was written by query number i, so that nothing above the diagonal is
    visible; a core may rely on it.
    chosen: entries that each query may read of those; None for all.
    """

    segment: Int[Array, "batch query"] | None = None
    window: int | None = None
    aligned: bool = False
    chosen: Bool[Array, "batch #kv_heads query key"] | None = None

    def of(
        self, entries: Entries, chosen: Bool[Array, "batch #kv_heads query key"] | None = None
    ) -> Mask:
        """The mask of one bag, which may have a window and a rate of its own."""
        windows = [window for window in (self.window, entries.window) if window is not None]
        aligned = self.aligned and entries.every == 1
        return replace(self, window=min(windows, default=None), aligned=aligned, chosen=chosen)

    def visible(
        self, position: Int[Array, "batch query"], entries: Entries
    ) -> Bool[Array, "batch #kv_heads query key"]:
        """Whether each query (at `position`) sees each entry."""
        distance = position[:, None, :, None] - entries.position[:, :, None, :]
        seen = distance >= 0
        if self.window is not None:
            seen &= distance < self.window
        if entries.valid is not None:
            seen &= entries.valid[:, :, None, :]
        if self.segment is not None and entries.segment is not None:
            seen &= self.segment[:, None, :, None] == entries.segment[:, :, None, :]
        return seen if self.chosen is None else seen & self.chosen
