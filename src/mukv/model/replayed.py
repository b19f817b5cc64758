"""Caches of a stack for scoring a prompt by a second reading, and for what is then kept of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from mukv.cache import Cache, Reader, Ring, Slot
from mukv.cache.replay import Replaying
from mukv.cache.seen import Score
from mukv.core.typing import Array, Int
from mukv.model.stack import Stack


def replaying(
    stack: Stack, cache: Cache, start: Int[Array, ""], chunk: int, sinks: int, plus: bool
) -> Cache:
    """Return a cache whose bodies without a window score entries by the tokens that are read next.

    cache: a full cache. start: first entry to score. chunk: their number. sinks: first entries that
    take part in the softmax. plus: whether weights are multiplied with norms, as in KVzip+.
    """

    def told(slot: Slot, heads: int) -> Slot:
        body = slot.body
        assert isinstance(body, Ring)
        score = jnp.zeros((len(cache.length), heads, chunk))
        return replace(slot, body=Replaying(body, score, start, chunk, sinks, plus))

    slots = (
        slot if bag.window is not None else told(slot, layer.softmax.key_heads)
        for (layer, _, bag), slot in zip(stack.bags, cache.slots, strict=True)
    )
    return replace(cache, slots=tuple(slots))


def scores(cache: Cache) -> tuple[Score, ...]:
    """Return the scores of the bodies of such a cache, in order."""
    bodies = (slot.body for slot in cache.slots)
    return tuple(body.score for body in bodies if isinstance(body, Replaying))


def compressed(
    stack: Stack, weights: Sequence[Any], whole: Cache, empty: Cache, given: Sequence[Score]
) -> Cache:
    """Return a cache that has what its policy keeps of a full one.

    weights: one entry per layer. empty: a cache of that policy. given: scores of each body without
    a window, in order, by position.
    """
    left = list(given)

    def kept(layer: Any, before: Slot, after: Slot) -> Slot:
        body = before.body
        assert isinstance(body, Ring)
        if body.wraps:
            return replace(after, body=body)
        reader = Reader(layer.softmax, weights[layer.index]["read"], None, left.pop(0))
        return after.extended(
            body.tensors, jnp.zeros_like(whole.length), whole.length, reader, fresh=True
        )

    pairs = zip(stack.bags, whole.slots, empty.slots, strict=True)
    slots = tuple(kept(layer, before, after) for (layer, _, _), before, after in pairs)
    return replace(empty, slots=slots, states=whole.states, length=whole.length)
