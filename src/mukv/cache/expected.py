"""Eviction by the expected attention of future queries (Devoto et al. 2025).

Queries before rotation are modelled as Gaussian, with the mean and covariance of the queries so
far, and rotated by the average rotation over the next positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from mukv.cache.keep import Sinking
from mukv.cache.seen import Score, Seen
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float


@dataclass(frozen=True)
class Expected(Sinking):
    """Score: expected attention weight under future queries, modelled as Gaussian, times the norm
    of the value (Devoto et al. 2025).

    The score of entry j is (softmax over j of m'.k_j / sqrt(d) + k_j C' k_j / (2 d), plus epsilon)
    |v_j|, where m' and C' are mean and covariance of rotated future queries and d is the width of
    a key; the softmax is averaged over the heads of a group. kvpress' leaderboard runs
    `expected(epsilon=0.01,recent=0)+adaptive`.

    future: number of next positions over which rotations are averaged
    sinks: number of first tokens, which are always kept; their queries do not count
    epsilon: number added to the mean softmax
    covariance: whether the term with the covariance C' is included
    vnorm: whether scores are multiplied by the norm of the value, |v_j|
    """

    future: int = 512
    epsilon: float = 0.0
    covariance: bool = True
    vnorm: bool = True

    needs_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "future")
        if self.epsilon < 0:
            raise BadInput("epsilon", self.epsilon, "at least 0")

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        attention, notes = seen.reader.attention, self._noted(seen)
        count = jnp.maximum(notes["count"], 1.0)[:, None, None, None]
        mean = notes["sum"] / count
        scale = (attention.scale or attention.query_dim**-0.5) * attention.position.logit_factor
        turn, key = self._average_rotation(seen), seen.keys()
        ahead = jnp.einsum("bde,bhge->bhgd", turn, mean) * scale
        logits = jnp.einsum("bhgd,bhkd->bhgk", ahead, key)
        if self.covariance:
            # Second-order term of the mean of the exponential of a Gaussian.
            squares = notes["squares"][..., _place(mean.shape[-1])]
            spread = squares / count[..., None] - mean[..., None] * mean[..., None, :]
            spread = jnp.einsum("bde,bhgef,bcf->bhgdc", turn, spread, turn) * scale**2
            logits += jnp.einsum("bhkd,bhgdc,bhkc->bhgk", key, spread, key) / 2
        there = seen.valid & ~seen.first(self.sinks)
        weights = jax.nn.softmax(jnp.where(there[:, :, None], logits, -jnp.inf), axis=-1)
        weights = jnp.mean(jnp.where(there[:, :, None], weights, 0.0), axis=2)
        weights += self.epsilon
        return weights * jnp.linalg.norm(seen.values(), axis=-1) if self.vnorm else weights, notes

    def _noted(self, seen: Seen) -> dict[str, Array]:
        """Return number, sum and sum of outer products of all queries so far, the new ones
        included. Queries are rotated back to position 0.
        """
        queries = seen.queries.astype(jnp.float32)
        place = jnp.arange(queries.shape[3])[None]
        position = seen.length[:, None] + place
        batch, heads, group, length, width = queries.shape
        flat = queries.reshape(batch, heads * group, length, width)
        turned = seen.rotated_back(flat, position[:, None])
        turned = turned.reshape(queries.shape)
        counted = (place < seen.added[:, None]) & (position >= self.sinks)
        turned = jnp.where(counted[:, None, None, :, None], turned, 0.0)
        new = {"count": jnp.sum(counted, axis=1), "sum": jnp.sum(turned, axis=3)}
        if self.covariance:
            squares = jnp.einsum("bhgqd,bhgqe->bhgde", turned, turned)
            new["squares"] = squares[..., *np.triu_indices(width)]
        return {name: seen.notes[name] + array for name, array in new.items()}

    def empty(self, batch: int, heads: int, group: int, width: int) -> dict[str, Array]:
        notes = {"count": jnp.zeros(batch), "sum": jnp.zeros((batch, heads, group, width))}
        if self.covariance:
            # A symmetric matrix: its upper triangle, row by row.
            notes["squares"] = jnp.zeros((batch, heads, group, width * (width + 1) // 2))
        return notes

    def _average_rotation(self, seen: Seen) -> Float[Array, "batch width width"]:
        """Compute the mean rotation matrix over the next `future` positions."""
        width = seen.reader.attention.query_dim
        units = jnp.eye(width)[None, :, None]

        def add(total: Array, step: Array) -> tuple[Array, None]:
            position = jnp.reshape(step, (1, 1, 1))
            return total + seen.rotated(units, position)[0, :, 0], None

        zeros = jnp.zeros((width, width))
        total, _ = jax.lax.scan(add, zeros, jnp.arange(self.future))
        # The rows of `total` are rotated unit vectors, which are columns of the mean rotation
        # matrix. They are then rotated by the length of each row of the batch.
        rows = jnp.tile((total / self.future)[None, :, None], (len(seen.length), 1, 1, 1))
        end = (seen.length + seen.added)[:, None, None]
        return seen.rotated(rows, end)[:, :, 0].swapaxes(-1, -2)


def _place(width: int) -> np.ndarray:
    """Return the place of each element of a symmetric matrix in its upper triangle, int [width
    width].
    """
    place = np.zeros((width, width), int)
    place[np.triu_indices(width)] = np.arange(width * (width + 1) // 2)
    return np.maximum(place, place.T)
