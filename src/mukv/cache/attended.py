"""Eviction by attention weight: of the last query (TOVA), the last few (SnapKV) or all (H2O)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.cache.keep import Keep
from mukv.cache.seen import Score, Seen
from mukv.core.counts import require_counts
from mukv.core.typing import Array, Bool, Int

CHUNK = 128
"""Number of queries whose attention weights exist at once while H2O sums them."""


@dataclass(frozen=True)
class TOVA(Keep):
    """Score: attention weight of the last query, mean over all heads of the layer (Oren et al.
    2024).
    """

    needs_queries: ClassVar[bool] = True

    @property
    def last_queries(self) -> int | None:
        return 1

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        weights = seen.weights(seen.last(1))
        mean = jnp.mean(weights, axis=(1, 2))
        return jnp.broadcast_to(mean, (len(mean), weights.shape[1], mean.shape[-1])), {}


@dataclass(frozen=True)
class SnapKV(Keep):
    """Score: mean attention weight of the last queries, smoothed over neighbours (Li et al. 2024).

    Entries of the window itself are always kept.

    window: number of last queries; at most half of the budget
    kernel: number of neighbours that are smoothed over
    pool: whether smoothing takes the mean or the maximum of the neighbours (RocketKV)
    """

    window: int = 32
    kernel: int = 5
    pool: Literal["mean", "max"] = "mean"

    needs_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "window", "kernel")

    @property
    def narrowest(self) -> int:
        return max(self.window, self.minimum)

    @property
    def last_queries(self) -> int | None:
        return self.window

    def _window(self, seen: Seen) -> Int[Array, " batch"]:
        return jnp.minimum(jnp.minimum(seen.number // 2, self.window), seen.added)

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        window, place = self._window(seen), seen.last(self.window)
        counted = jnp.arange(self.window)[None] >= self.window - window[:, None]
        weights = seen.weights(jnp.where(counted, place, -1))
        mean = jnp.sum(weights, axis=3) / jnp.maximum(window, 1)[:, None, None, None]
        prefix = jnp.where(seen.recent(window)[:, :, None], 0.0, mean)
        half = self.kernel // 2
        smooth = jax.lax.reduce_window(
            prefix,
            0.0,
            jax.lax.add if self.pool == "mean" else jax.lax.max,
            (1, 1, 1, self.kernel),
            (1, 1, 1, 1),
            [(0, 0), (0, 0), (0, 0), (half, self.kernel - 1 - half)],
        )
        share = 1 / self.kernel if self.pool == "mean" else 1.0
        return jnp.mean(smooth * share, axis=2), {}

    def must(self, seen: Seen) -> Bool[Array, "batch stores key"]:
        return seen.recent(jnp.maximum(self._window(seen), self.recent))


@dataclass(frozen=True)
class H2O(Keep):
    """Score: attention weight summed over all queries so far (Zhang et al. 2023).

    The most recent half of the budget is always kept.
    """

    needs_queries: ClassVar[bool] = True
    carries: ClassVar[bool] = True

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        assert seen.carried is not None
        queries = seen.queries.shape[3]
        chunk = min(CHUNK, queries)

        def add(total: Array, start: Array) -> tuple[Array, None]:
            place = jnp.broadcast_to(start + jnp.arange(chunk), (len(total), chunk))
            weights = jnp.mean(jnp.sum(seen.weights(place), axis=3), axis=2)
            return total + weights, None

        shape = (len(seen.length), seen.queries.shape[1], seen.valid.shape[-1])
        total, _ = jax.lax.scan(add, jnp.zeros(shape), jnp.arange(0, queries, chunk))
        return total + seen.carried, {}

    def must(self, seen: Seen) -> Bool[Array, "batch stores key"]:
        return seen.recent(jnp.maximum(seen.number // 2, self.recent))
