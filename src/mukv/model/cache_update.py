"""Split a cache by layer, for a pass that replaces the part of each layer, and join it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from mukv.attention import EntryStore, Written
from mukv.cache import Cache, Slot
from mukv.model.plan import ResolvedLayer

LayerBag = tuple[ResolvedLayer, str, EntryStore]
"""A layer that writes, and the name and specification of one of its stores of entries."""


class LayerMemory(NamedTuple):
    """The slots and states of one layer, by the names of their stores."""

    slots: dict[str, Slot]
    states: Written


def memories(
    bags: Sequence[LayerBag], writers: Sequence[ResolvedLayer], cache: Cache
) -> dict[int, LayerMemory]:
    """Split a cache by the index of the layer that writes it.

    bags: in the order of the cache's slots. writers: the layers that write, in order.
    """
    split = {
        layer.index: LayerMemory({}, states)
        for layer, states in zip(writers, cache.states, strict=True)
    }
    for (layer, name, _), slot in zip(bags, cache.slots, strict=True):
        split[layer.index].slots[name] = slot
    return split


def joined(
    bags: Sequence[LayerBag],
    writers: Sequence[ResolvedLayer],
    cache: Cache,
    split: Mapping[int, LayerMemory],
) -> Cache:
    """Put the slots and states of `memories` back into a cache.

    The order of the slots comes from `bags`, because `jax.jit` sorts a dict by its keys.
    """
    return replace(
        cache,
        slots=tuple(split[layer.index].slots[name] for layer, name, _ in bags),
        states=tuple(split[layer.index].states for layer in writers),
    )
