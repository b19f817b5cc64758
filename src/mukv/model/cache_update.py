"""The slots and states of a cache while a pass through the layers replaces them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mukv.attention import Carried, EntryStore, Written
from mukv.cache import Cache, Slot
from mukv.core.typing import Array, Int
from mukv.model.plan import ResolvedLayer

LayerBag = tuple[ResolvedLayer, str, EntryStore]
"""A layer that writes, and the name and specification of one of its stores of entries."""


class CacheUpdate:
    """A mutable copy of a cache's slots and states, by layer.

    bags: stores in the order of the cache's slots. writers: layers that write, in order.
    """

    def __init__(self, bags: Sequence[LayerBag], writers: Sequence[ResolvedLayer], cache: Cache):
        self.before = cache
        self.slots = {
            (layer.index, name): slot
            for (layer, name, _), slot in zip(bags, cache.slots, strict=True)
        }
        indices = (layer.index for layer in writers)
        self.states = dict(zip(indices, cache.states, strict=True))

    def slot(self, layer: ResolvedLayer, name: str) -> Slot:
        """Return the current slot of one store of a layer."""
        return self.slots[layer.index, name]

    def put(self, layer: ResolvedLayer, name: str, slot: Slot) -> None:
        """Replace the slot of one store of a layer."""
        self.slots[layer.index, name] = slot

    def carried(self, count: Int[Array, " batch"]) -> dict[int, Carried]:
        """Return the states that each layer continues from.

        count: number of new tokens of each row
        """
        return {index: Carried(states, count) for index, states in self.states.items()}

    def keep_states(self, layer: ResolvedLayer, written: Written) -> None:
        """Replace the states of a layer by those that it wrote."""
        self.states[layer.index] = {name: written[name] for name in layer.attention.states}

    def cache(self) -> Cache:
        """Return the cache with the current slots and states."""
        return replace(
            self.before, slots=tuple(self.slots.values()), states=tuple(self.states.values())
        )
