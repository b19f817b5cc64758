"""Allocate the cache of a stack."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from mukv.attention import EntryStore
from mukv.cache import FULL, Cache, Calibrated, Policy, Ring, Slot, choosing
from mukv.cache.base import QUERY
from mukv.core.typing import Array
from mukv.model.plan import ResolvedLayer
from mukv.model.stack import Stack


def empty_cache(
    stack: Stack,
    batch: int,
    length: int,
    tail: int,
    dtype: jnp.dtype,
    policy: Policy = FULL,
    centres: Calibrated | None = None,
    after: int | None = None,
    kept: Sequence[int] | None = None,
) -> Cache:
    """Allocate an empty cache.

    batch: number of rows
    length: capacity of the bodies, in tokens per row
    tail: capacity of the tails, in tokens per row
    dtype: type of the entries
    policy: cache policy of stores without a window
    centres: calibrated cluster centres by layer, for policies that use them
    after: most tokens of a row that follow its prompt; None if that is not known
    kept: entries that each store without a window keeps of a prompt, if layers share a budget
    """

    def slot(layer: ResolvedLayer, name: str, bag: EntryStore) -> Slot:
        def zeros(entries: int) -> dict[str, Array]:
            tokens = entries * bag.every
            shapes = layer.attention.written(stack.d_model, batch, tokens, dtype)[name]
            return {part: jnp.zeros(shape.shape, shape.dtype) for part, shape in shapes.items()}

        places = zeros(bag.places(tail))
        if policy.everything or bag.window is not None:
            ring = Ring(zeros(bag.room(length)), bag.window is not None)
            return Slot(ring, places, bag)
        place = stack.place(layer, name)
        own = (centres or {}).get(layer.index, {})
        room = batch, bag.room(length), dtype
        rest = None if after is None else -(-after // bag.every)
        count = None if kept is None else kept[place[0]]
        body = policy.body(layer.softmax, stack.d_model, *room, place, own, name, rest, count)
        told = choosing(body, False)
        number = tail if told.last_queries is None else min(tail, told.last_queries)
        if told.needs_queries and number:
            shape = (batch, layer.softmax.heads, number, layer.softmax.query_dim)
            places[QUERY] = jnp.zeros(shape, dtype)
        return Slot(body, places, bag)

    return Cache(
        slots=tuple(slot(*bag) for bag in stack.bags),
        states=tuple(
            {name: state.zeros(batch) for name, state in layer.attention.states.items()}
            for layer in stack.writers
        ),
        length=jnp.zeros(batch, jnp.int32),
        filled=jnp.zeros((), jnp.int32),
        tail_size=tail,
    )
