"""Eviction: choose the entries to keep within a static budget. The default keeps all.

A policy scores the entries. Those with the highest scores are kept, in the order of their
positions, the newer one of equal scores, and always the last token. This happens after prefill and
whenever a tail is folded, so that a body plus tail never exceeds its budget plus one tail.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.cache.budget import CacheBudget
from mukv.cache.seen import Score, Seen
from mukv.core.typing import Array, Bool, Float, Int

Spread = Literal["uniform", "pyramid", "adaptive"]
FLOOR = 0.2
"""Fraction of the budget that each head keeps for certain where heads share one (AdaKV's alpha)."""


@dataclass(frozen=True)
class Chosen:
    """Result of a choice.

    index: indices of the kept entries, in the order of their positions
    there: which of these places are in use
    score: score of every entry
    notes: state of the policy for the next choice
    """

    index: Int[Array, "batch stores slot"]
    there: Bool[Array, "batch stores slot"]
    score: Float[Array, "batch stores key"]
    notes: Mapping[str, Array]


@dataclass(frozen=True)
class Keep:
    """Base class of eviction policies.

    budget: per store (a KV head, where each head has its own tensors)
    spread: "uniform"; "pyramid" gives early layers more than late ones; "adaptive" lets the heads
        of a layer share one budget, so that heads with flat attention keep more (AdaKV, Feng et al.
        2024)
    """

    budget: CacheBudget = field(default_factory=CacheBudget)
    spread: Spread = "uniform"

    needs_queries: ClassVar[bool] = False
    """Whether scores depend on queries."""
    carries: ClassVar[bool] = False
    """Whether scores are accumulated from one choice to the next."""
    evicts: ClassVar[bool] = True
    """Whether any entry is ever dropped."""

    @property
    def minimum(self) -> int:
        """Smallest number of entries that a budget may allow."""
        return 2

    @property
    def last_queries(self) -> int | None:
        """Number of the newest queries on which scores depend; None for all. A tail keeps no more
        of them.
        """
        return None

    def empty(self, batch: int, heads: int, group: int, width: int) -> dict[str, Array]:
        """Return the initial state of the policy."""
        return {}

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        """Score each entry, per KV head or for all heads alike; also return the policy's
        new state.
        """
        raise NotImplementedError

    def must(self, seen: Seen) -> Bool[Array, "batch stores key"]:
        """Return which entries are kept whatever their score."""
        return seen.recent(1)

    def chosen(self, seen: Seen, capacity: int) -> Chosen:
        """Choose at most `seen.number` entries per store, into `capacity` places."""
        score, notes = self.score(seen)
        stores, keys = seen.entries.position.shape[1:]
        if self.spread == "adaptive":
            # In a shared pool an entry belongs to one head, so its scores of other heads are
            # dropped.
            must = seen.valid & (self.must(seen) | self._floor(score, seen))
            score = jnp.sum(jnp.where(seen.valid, score, 0.0), axis=1, keepdims=True)
            must, valid = must.any(axis=1, keepdims=True), seen.valid.any(axis=1, keepdims=True)
            number = seen.number * seen.valid.shape[1]
        else:
            score = jnp.mean(score.reshape(len(score), stores, -1, keys), axis=2)
            must, valid, number = self.must(seen), seen.valid, seen.number
        rank = jnp.where(valid, jnp.where(must, jnp.inf, score), -jnp.inf)
        places = min(capacity, keys)
        best, index = jax.lax.top_k(jnp.flip(rank, axis=-1), places)
        there = (jnp.arange(places)[None, None] < number[:, None, None]) & (best > -jnp.inf)
        index = jnp.sort(jnp.where(there, keys - 1 - index, keys), axis=-1)
        index = jnp.pad(index, [(0, 0), (0, 0), (0, capacity - places)], constant_values=keys)
        return Chosen(jnp.minimum(index, keys - 1), index < keys, score, notes)

    def _floor(self, score: Score, seen: Seen) -> Bool[Array, "batch heads key"]:
        """Return the best entries of each head, up to its guaranteed fraction of the budget."""
        own = jnp.where(seen.valid, score, -jnp.inf)
        ordered = jnp.sort(own, axis=-1, descending=True)
        number = (seen.number * FLOOR).astype(jnp.int32)
        least = jnp.take_along_axis(ordered, jnp.maximum(number - 1, 0)[:, None, None], axis=-1)
        return (own >= least) & (number > 0)[:, None, None]


@dataclass(frozen=True)
class Everything(Keep):
    """Keep all entries."""

    evicts: ClassVar[bool] = False

    def chosen(self, seen: Seen, capacity: int) -> Chosen:
        keys = seen.valid.shape[-1]
        index = jnp.broadcast_to(jnp.arange(capacity), (*seen.valid.shape[:-1], capacity))
        valid = jnp.pad(seen.valid, [(0, 0), (0, 0), (0, max(0, capacity - keys))])
        return Chosen(
            jnp.minimum(index, keys - 1),
            valid[..., :capacity],
            jnp.zeros(seen.valid.shape),
            {},
        )
