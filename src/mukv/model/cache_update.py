"""The part of a cache that belongs to one layer, which a pass through the layers replaces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax

from mukv.attention import Attention, EntryStore, Queries, Written
from mukv.cache import Cache, Reader, Slot
from mukv.core.typing import Array, Int
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
    """Put the slots and states of `memories` back into a cache. (The order is that of `bags`: a
    dict that has passed through `jax.jit` is sorted by its keys.)
    """
    return replace(
        cache,
        slots=tuple(split[layer.index].slots[name] for layer, name, _ in bags),
        states=tuple(split[layer.index].states for layer in writers),
    )


@partial(jax.jit, static_argnums=(0, 1))
def extended(
    attention: Attention,
    fresh: bool,
    slot: Slot,
    reading: Any,
    queries: Queries | None,
    new: Any,
    length: Int[Array, " batch"],
    added: Int[Array, " batch"],
) -> Slot:
    """Apply `Slot.extended`, as a function that equal layers share."""
    return slot.extended(new, length, added, Reader(attention, reading, queries), fresh)
