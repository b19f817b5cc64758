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

from mukv.cache.keep import Keep
from mukv.cache.seen import Score, Seen
from mukv.core.typing import Array, Bool, Float


@dataclass(frozen=True)
class Expected(Keep):
    """Score of key j: softmax over j of m'.k / sqrt(d) + k C' k / (2 d), times |v_j| + epsilon
    (Devoto et al. 2025).

    m' and C' are mean and covariance of rotated future queries; the softmax is averaged over the
    heads of a group.

    future: number of next positions over which rotations are averaged
    sinks: number of first tokens, which are always kept, and whose queries are not counted
    epsilon: added to the norm of the value
    """

    future: int = 512
    sinks: int = 4
    epsilon: float = 0.0

    needs_queries: ClassVar[bool] = True

    @property
    def minimum(self) -> int:
        return self.sinks + 1

    def must(self, seen: Seen) -> Bool[Array, "batch stores key"]:
        return seen.first(self.sinks) | seen.recent(1)

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        attention, notes = seen.reader.attention, self._noted(seen)
        count = jnp.maximum(notes["count"], 1.0)[:, None, None, None]
        mean = notes["sum"] / count
        spread = notes["squares"] / count[..., None] - mean[..., None] * mean[..., None, :]
        scale = (attention.scale or attention.query_dim**-0.5) * attention.position.logit_factor
        turn = self._average_rotation(seen)
        mean = jnp.einsum("bde,bhge->bhgd", turn, mean) * scale
        spread = jnp.einsum("bde,bhgef,bcf->bhgdc", turn, spread, turn) * scale**2
        key = seen.keys()
        logits = jnp.einsum("bhgd,bhkd->bhgk", mean, key)
        # Second-order term of the mean of the exponential of a Gaussian.
        logits += jnp.einsum("bhkd,bhgdc,bhkc->bhgk", key, spread, key) / 2
        there = seen.valid & ~seen.first(self.sinks)
        weights = jax.nn.softmax(jnp.where(there[:, :, None], logits, -jnp.inf), axis=-1)
        weights = jnp.mean(jnp.where(there[:, :, None], weights, 0.0), axis=2)
        return weights * (jnp.linalg.norm(seen.values(), axis=-1) + self.epsilon), notes

    def _noted(self, seen: Seen) -> dict[str, Array]:
        """Update number, sum and sum of outer products of all queries so far, rotated back to
        position 0.
        """
        queries = seen.queries.astype(jnp.float32)
        place = jnp.arange(queries.shape[3])[None]
        position = seen.length[:, None] + place
        batch, heads, group, length, width = queries.shape
        flat = queries.reshape(batch, heads * group, length, width)
        # A factor of the rotation (YaRN) is divided out twice, because rotating back multiplies by
        # it again.
        gain = self._rotated(seen, jnp.ones((1, 1, 1, width)), jnp.zeros((1, 1, 1), jnp.int32))
        turned = self._rotated(seen, flat, -position[:, None]) / gain**2
        turned = turned.reshape(queries.shape)
        counted = (place < seen.added[:, None]) & (position >= self.sinks)
        turned = jnp.where(counted[:, None, None, :, None], turned, 0.0)
        return {
            "count": seen.notes["count"] + jnp.sum(counted, axis=1),
            "sum": seen.notes["sum"] + jnp.sum(turned, axis=3),
            "squares": seen.notes["squares"] + jnp.einsum("bhgqd,bhgqe->bhgde", turned, turned),
        }

    def empty(self, batch: int, heads: int, group: int, width: int) -> dict[str, Array]:
        return {
            "count": jnp.zeros(batch),
            "sum": jnp.zeros((batch, heads, group, width)),
            "squares": jnp.zeros((batch, heads, group, width, width)),
        }

    def _average_rotation(self, seen: Seen) -> Float[Array, "batch width width"]:
        """Compute the mean rotation matrix over the next `future` positions."""
        width = seen.reader.attention.query_dim
        units = jnp.eye(width)[None, :, None]

        def add(total: Array, step: Array) -> tuple[Array, None]:
            position = jnp.reshape(step, (1, 1, 1))
            return total + self._rotated(seen, units, position)[0, :, 0], None

        zeros = jnp.zeros((width, width))
        total, _ = jax.lax.scan(add, zeros, jnp.arange(self.future))
        # Rows are rotated unit vectors, i.e. columns of the matrix; then rotate to each row's own
        # end.
        rows = jnp.tile((total / self.future)[None, :, None], (len(seen.length), 1, 1, 1))
        end = (seen.length + seen.added)[:, None, None]
        return self._rotated(seen, rows, end)[:, :, 0].swapaxes(-1, -2)

    def _rotated(
        self, seen: Seen, x: Float[Array, "batch heads token width"], position: Array
    ) -> Float[Array, "batch heads token width"]:
        """Rotate by position alone; only the last `rotated_dim` dimensions are rotated."""
        attention = seen.reader.attention
        start = x.shape[-1] - attention.rotated_dim
        turned = attention.rotate(x[..., start:], position)
        return jnp.concatenate([x[..., :start], turned], axis=-1)
