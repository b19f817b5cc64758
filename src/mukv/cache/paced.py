"""Bags of stores with several tokens per entry, or with a window."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import no_type_check

import jax

from mukv.attention import Bag, Entries, Query, Recall, Retrieved
from mukv.attention.mixer import EntryStore
from mukv.core.typing import Array, Int


@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Paced:
    """A bag of a store with several tokens per entry, or with a window. Its positions are converted
    from numbers of entries to the numbers of tokens that queries have."""

    bag: Bag
    store: EntryStore = field(metadata={"static": True})

    def retrieve(self, query: Query, recall: Recall) -> Retrieved:
        recalled, entries = self.bag.retrieve(query, lambda found: recall(self.placed(found)))
        return recalled, self.placed(entries)

    def taken(self, place: Int[Array, "batch 1 number"]) -> Entries | None:
        entries = self.bag.taken(place)
        return None if entries is None else self.placed(entries)

    def placed(self, entries: Entries) -> Entries:
        """Return the entries with the positions of their last tokens."""
        position = self.store.last_token(entries.position)
        every, window = self.store.every, self.store.window
        return replace(entries, position=position, window=window, every=every)
