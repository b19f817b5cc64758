"""The slots and states of a cache while a pass through the layers replaces them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mukv.attention import Carried, EntryStore, Written
from mukv.cache import Cache, Slot
from mukv.core.typing import Array, Int
from mukv.model.plan import ResolvedLayer

LayerBag = tuple[ResolvedLayer, str, EntryStore]
"""A store of entries of a layer that writes, with its name."""


class CacheUpdate:
    """bags: in the order of the cache's slots. writers: the layers that write, in order."""

    def __init__(self, bags: Sequence[LayerBag], writers: Sequence[ResolvedLayer], cache: Cache):
        self.before = cache
        self.slots = {
            (layer.index, name): slot
            for (layer, name, _), slot in zip(bags, cache.slots, strict=True)
        }
        indices = (layer.index for layer in writers)
        self.states = dict(zip(indices, cache.states, strict=True))

    def slot(self, layer: ResolvedLayer, name: str) -> Slot:
        return self.slots[layer.index, name]

    def put(self, layer: ResolvedLayer, name: str, slot: Slot) -> None:
        self.slots[layer.index, name] = slot

    def carried(self, count: Int[Array, " batch"]) -> dict[int, Carried]:
        """What the layers continue from. count: new tokens of each row."""
        return {index: Carried(states, count) for index, states in self.states.items()}

    def keep_states(self, layer: ResolvedLayer, written: Written) -> None:
        self.states[layer.index] = {name: written[name] for name in layer.attention.states}

    def cache(self) -> Cache:
        return replace(
            self.before, slots=tuple(self.slots.values()), states=tuple(self.states.values())
        )
