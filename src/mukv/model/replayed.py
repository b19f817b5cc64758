"""Caches of a stack that score the entries of a prompt by a second reading."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp

from mukv.cache import Cache, Ring, Slot
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
