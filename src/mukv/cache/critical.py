"""Refine scores by how much an entry's value changes the output (CriticalKV, Feng et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.cache.budget import portion
from mukv.cache.rank import by_store, places
from mukv.cache.refine import Refine
from mukv.cache.seen import Seen
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float, Int

CHUNK = 512
"""Number of entries whose projected values exist at once."""


@dataclass(frozen=True)
class Critical(Refine):
    """Score: (score + epsilon) times the L1 norm of the projected value (CriticalKV, Feng et al.
    2025).

    The value is projected by the output weights of each query head of its group, and the norms are
    averaged.

    With `adaptive`, the unrefined scores decide the budgets of heads, as in CriticalAdaKV.

    epsilon: number added to the score
    first: fraction of the budget that is kept by the unrefined score, at least one entry; 0 for
        none
    """

    epsilon: float = 1e-4
    first: float = 0.5

    needs_weights: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.epsilon < 0:
            raise BadInput("epsilon", self.epsilon, "at least 0")
        if not 0 <= self.first <= 1:
            raise BadInput("first", self.first, "a share from 0 to 1")

    def apply(
        self,
        score: Float[Array, "batch stores key"],
        seen: Seen,
        number: Int[Array, "batch #stores 1"],
    ) -> Float[Array, "batch stores key"]:
        norm = by_store(projected(seen), score.shape[1])
        certain = places(score) < portion(number, self.first, least=1)
        finite = jnp.isfinite(score)
        new = jnp.where(finite, (jnp.where(finite, score, 0.0) + self.epsilon) * norm, score)
        return jnp.where(certain & (score > -jnp.inf), jnp.inf, new)


def projected(seen: Seen) -> Float[Array, "batch kv_heads key"]:
    """Return the L1 norm of the output projection of each entry's value, mean over the query heads
    of a group."""
    return jnp.mean(projected_by_head(seen, order=1), axis=2)


def projected_by_head(seen: Seen, order: Literal[1, 2]) -> Float[Array, "batch kv_heads group key"]:
    """Return the norm of the output projection of each entry's value by each query head.

    order: 1 for the sum of absolute values, 2 for the root of the sum of squares
    """
    value = seen.values().astype(jnp.float32)
    batch, heads, keys, width = value.shape
    output = jnp.asarray(seen.reader.weights["output"], jnp.float32)
    output = output.reshape(heads, -1, *output.shape[1:])
    chunk = min(CHUNK, keys)
    padded = jnp.pad(value, [(0, 0), (0, 0), (0, -keys % chunk), (0, 0)])
    chunks = jnp.moveaxis(padded.reshape(batch, heads, -1, chunk, width), 2, 0)

    def norm(part: Array) -> Array:
        return jnp.linalg.norm(jnp.einsum("bhkv,hgve->bhgke", part, output), order, axis=-1)

    found = jax.lax.map(norm, chunks)
    return jnp.moveaxis(found, 0, 3).reshape(batch, heads, output.shape[1], -1)[..., :keys]
