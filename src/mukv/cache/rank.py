"""Rank entries by their scores; of two equal scores the newer entry comes first."""

from __future__ import annotations

import jax.numpy as jnp

from mukv.core.typing import Array, Float, Int


def places(score: Float[Array, "batch stores key"]) -> Int[Array, "batch stores key"]:
    """Return the rank of each entry in the order of falling scores, from 0."""
    newest_first = jnp.flip(score, axis=-1)
    order = jnp.argsort(newest_first, axis=-1, descending=True, stable=True)
    return jnp.flip(jnp.argsort(order, axis=-1), axis=-1)


def by_store(
    score: Float[Array, "batch heads key"], stores: int
) -> Float[Array, "batch stores key"]:
    """Return the mean over the heads of each store."""
    return jnp.mean(score.reshape(len(score), stores, -1, score.shape[-1]), axis=2)
