"""Split a cache by layer, for a pass that replaces the part of each layer, and join it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mukv.attention import Attention, EntryStore, Queries, Written
from mukv.cache import Cache, Reader, Recorded, Ring, Slot
from mukv.cache.seen import Score
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
    """Put the slots and states of `memories` back into a cache.

    The order of the slots comes from `bags`, because `jax.jit` sorts a dict by its keys.
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
    scores: Score | None = None,
) -> Slot:
    """Apply `Slot.extended`, as a function that equal layers share."""
    return slot.extended(new, length, added, Reader(attention, reading, queries, scores), fresh)


def compressed(
    bags: Sequence[LayerBag],
    weights: Sequence[Any],
    whole: Cache,
    empty: Cache,
    scores: Sequence[Score] = (),
) -> Cache:
    """Return the cache that prefill makes under a policy, from a cache that has all entries.

    bags: of the cache
    weights: one entry per layer
    whole: cache of the same tokens that is full, or made under `mukv.cache.RECORD`, which also has
        the queries
    empty: cache under the policy
    scores: of each body without a window, in order, by position; empty if the policy computes them
    """
    left, nothing = list(scores), jnp.zeros_like(whole.length)

    def kept(layer: ResolvedLayer, before: Slot, after: Slot) -> Slot:
        body: Any = before.body
        if isinstance(body, Ring) and body.wraps:
            return replace(after, body=body)
        queries = body.queries if isinstance(body, Recorded) else None
        given = weights[layer.index]["read"], queries, body.tensors, nothing, whole.length
        return extended(layer.softmax, True, after, *given, left.pop(0) if left else None)

    pairs = zip(bags, whole.slots, empty.slots, strict=True)
    slots = tuple(kept(layer, before, after) for (layer, _, _), before, after in pairs)
    return replace(empty, slots=slots, states=whole.states, length=whole.length)
