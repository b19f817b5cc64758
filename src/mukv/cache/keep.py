"""Eviction: choose the entries to keep within a static budget. The default keeps all.

A policy scores the entries, and those with the highest scores are kept in the order of their
positions. Of two equal scores the newer entry is kept, and the last token always. Entries are
chosen after prefill and whenever a tail is folded, so that body and tail together never hold more
than the budget plus one tail, unless the policy chooses at other times (`when.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mukv.attention import Entries
from mukv.cache.budget import CacheBudget
from mukv.cache.merge import Drop, Merge
from mukv.cache.rank import by_store
from mukv.cache.refine import Refine, refined
from mukv.cache.seen import Score, Seen
from mukv.cache.spread import Spread, Uniform
from mukv.cache.when import Folds, When
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Bool, Float, Int

CARRIED = "carried"
"""Note of numbers [batch heads key] that are carried with the entries in place of their scores."""


@dataclass(frozen=True)
class Chosen:
    """Result of a choice.

    index: indices of the kept entries, in the order of their positions
    there: which of these places are in use
    score: number of every entry that is carried with it
    notes: state of the policy for the next choice
    """

    index: Int[Array, "batch stores slot"]
    there: Bool[Array, "batch stores slot"]
    score: Float[Array, "batch stores key"]
    notes: Mapping[str, Array]


@dataclass(frozen=True)
class Keep:
    """Base class of eviction policies.

    budget: number of entries per store, which is a KV head where each head has its own tensors
    spread: how layers and heads share the budget
    refine: functions applied to the scores, one after the other, before entries are chosen
    when: times at which entries are chosen
    merge: what becomes of entries that are not kept
    recent: number of newest tokens that are always kept
    """

    budget: CacheBudget = field(default_factory=CacheBudget)
    spread: Spread = field(default_factory=Uniform)
    refine: tuple[Refine, ...] = ()
    when: When = field(default_factory=Folds)
    merge: Merge = field(default_factory=Drop)
    recent: int = 1

    has_budget: ClassVar[bool] = True
    needs_queries: ClassVar[bool] = False
    """Whether scores depend on queries."""
    carries: ClassVar[bool] = False
    """Whether a number of each entry is carried from one choice to the next: the note `CARRIED` of
    `score`, or else the score itself."""
    signed: ClassVar[bool] = False
    """Whether scores may be negative."""
    rotates_back: ClassVar[bool] = False
    """Whether the score undoes the rotation of keys, which requires one entry per token."""
    replays: ClassVar[bool] = False
    """Whether scores are made by reading the prompt a second time."""
    evicts: ClassVar[bool] = True
    """Whether any entry is ever dropped."""
    limits: ClassVar[bool] = False
    """Whether queries do not read entries that are to be dropped, even before they are: `decided`
    and `until`."""
    calibrated: ClassVar[tuple[str, ...]] = ()
    """Names of the calibrated arrays of a layer that scores depend on; they are among the notes."""

    def __post_init__(self) -> None:
        if self.recent < 0:
            raise BadInput("recent", self.recent, "at least 0")

    @property
    def minimum(self) -> int:
        """Smallest number of entries that a budget may allow."""
        return max(self.recent + 1, 2)

    @property
    def by_threshold(self) -> bool:
        """Whether entries are dropped for their score even if the budget has room for them."""
        return any(step.before_sharing for step in self.refine)

    @property
    def narrowest(self) -> int:
        """Smallest number of entries that `pyramid` gives to a layer."""
        return self.minimum

    def check(self, policy: Any, layer: str, attention: Any) -> None:
        """Raise BadInput if a `Policy` with this part does not fit an attention. layer: its name"""

    def of_attention(self, attention: Any) -> Keep:
        """Return this policy with the settings that a layer's attention gives it."""
        return self

    def of_layer(self, place: int, layers: int, length: int) -> Keep:
        """Return this policy for layer `place` of `layers`, of a cache for `length` tokens."""
        budget = self.spread.of_layer(self.budget, place, layers, length, self.narrowest)
        return replace(self, budget=budget)

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
        """Return the score of each entry, per KV head or one for all heads, and the new state of
        the policy.
        """
        raise NotImplementedError

    def must(self, seen: Seen) -> Bool[Array, "batch stores key"]:
        """Return which entries are kept regardless of their score."""
        return seen.recent(self.recent)

    def until(
        self, score: Float[Array, "batch stores key"], position: Int[Array, "batch #stores key"]
    ) -> Int[Array, "batch stores key"]:
        """Return the position of the last query that may see each entry, from carried scores."""
        raise NotImplementedError

    def decided(
        self,
        score: Float[Array, "batch stores slot"],
        position: Int[Array, "batch stores slot"],
        there: Bool[Array, "batch heads slot"],
        newest: Entries,
    ) -> tuple[Float[Array, "batch stores slot"], Entries]:
        """Return the carried scores of a body, which newer entries may decide, and these entries
        with the last query that may see each. there: slots in use, as in `Shelf.there`
        """
        raise NotImplementedError

    def chosen(self, seen: Seen, capacity: int) -> Chosen:
        """Choose at most `seen.number` entries per store, into `capacity` places."""
        score, noted = self.score(seen)
        notes = {name: array for name, array in noted.items() if name != CARRIED}
        stores, keys = seen.entries.position.shape[1:]
        # One set of entries per head where heads share a pool; otherwise one per store.
        score = by_store(score, seen.valid.shape[1])
        must = seen.valid & self.must(seen)
        own = jnp.where(must, jnp.inf, jnp.where(seen.valid, score, -jnp.inf))
        first = [step for step in self.refine if step.before_sharing]
        own = refined(own, seen, seen.number[:, None, None], first)
        then = tuple(step for step in self.refine if not step.before_sharing)
        rank, number = self.spread.ranked(own, seen, then)
        places = min(capacity, keys)
        best, index = jax.lax.top_k(jnp.flip(rank, axis=-1), places)
        there = (jnp.arange(places)[None, None] < number[:, None, None]) & (best > -jnp.inf)
        index = jnp.sort(jnp.where(there, keys - 1 - index, keys), axis=-1)
        index = jnp.pad(index, [(0, 0), (0, 0), (0, capacity - places)], constant_values=keys)
        score = by_store(noted[CARRIED], score.shape[1]) if CARRIED in noted else score
        if score.shape[1] != stores:
            # In a pool an entry belongs to one head, so its scores of other heads are dropped.
            score = jnp.sum(jnp.where(seen.valid, score, 0.0), axis=1, keepdims=True)
        return Chosen(jnp.minimum(index, keys - 1), index < keys, score, notes)


@dataclass(frozen=True)
class Sinking(Keep):
    """Base class of policies that always keep the first tokens.

    sinks: number of first tokens that are always kept
    """

    sinks: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sinks < 0:
            raise BadInput("sinks", self.sinks, "at least 0")

    @property
    def minimum(self) -> int:
        return max(self.sinks + max(self.recent, 1), 2)

    def must(self, seen: Seen) -> Bool[Array, "batch stores key"]:
        return seen.first(self.sinks) | seen.recent(self.recent)


@dataclass(frozen=True)
class Everything(Keep):
    """Keep all entries."""

    has_budget: ClassVar[bool] = False
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
