"""Eviction by learned gates: decided by the next token, delayed by a window (DMS)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax.numpy as jnp

from mukv.attention import Entries
from mukv.attention.eviction import EVICTION, of_next, until
from mukv.cache.keep import CARRIED, Chosen, Keep
from mukv.cache.seen import Score, Seen
from mukv.cache.select import All
from mukv.cache.values import CAPPED
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Bool, Float, Int


@dataclass(frozen=True)
class DMS(Keep):
    """Drop the entries that the model's gates evict (DMS, Łańcucki et al. 2025).

    The score of an entry is the negative logit of the gate of the token after it. The entry is
    dropped if the logit is above `threshold`, once queries are more than `window` tokens after it;
    no query reads it from there on, even if it is still stored. Of the other entries at most the
    budget is kept, those with the lowest logits.

    window: number of tokens after an entry whose queries read it in any case; None for the number
        that the gates were trained with
    threshold: logit above which an entry is dropped; the higher, the more entries are kept
    """

    window: int | None = None
    threshold: float = 0.0

    carries: ClassVar[bool] = True
    signed: ClassVar[bool] = True
    limits: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "window")
        if not math.isfinite(self.threshold):
            raise BadInput("threshold", self.threshold, "a finite number")

    @property
    def by_threshold(self) -> bool:
        return True

    def check(self, policy: Any, layer: str, attention: Any) -> None:
        allowed = None
        if getattr(attention, EVICTION, None) is None:
            allowed = (
                f"a model with learned gates (model.attention.eviction): {layer} "
                f"({attention.kind}) has none; train.adapter of kind eviction trains them"
            )
        elif not isinstance(policy.select, All):
            allowed = "dms without a part that chooses what is read: gates are decided per entry"
        if allowed:
            raise BadInput("policy", policy.name, allowed)

    def of_attention(self, attention: Any) -> DMS:
        return self if self.window else replace(self, window=attention.eviction.window)

    def empty(self, batch: int, heads: int, group: int, width: int) -> dict[str, Array]:
        return {CAPPED: jnp.zeros(batch, jnp.int32)}

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        assert seen.carried is not None
        position, shape = seen.entries.position, seen.valid.shape
        logits = seen.entries.tensors[EVICTION][..., 0].astype(jnp.float32)
        pairs = seen.valid[..., 1:] & seen.valid[..., :-1]
        if len(pairs[0]) != len(position[0]):
            pairs = jnp.any(pairs, axis=1, keepdims=True)  # both belong to one head of a pool
        pairs &= position[..., 1:] == position[..., :-1] + 1
        decided = jnp.pad(pairs, [(0, 0), (0, 0), (0, 1)])
        score = jnp.where(decided, -of_next(logits, 0.0), jnp.inf)
        # Older entries were decided when they were new; the token after them may be gone.
        undecided = position >= seen.length[:, None, None] - 1
        score = jnp.where(undecided, score, seen.carried)
        cut = jnp.where(self.evicted(score), -jnp.inf, score)
        read = (seen.length + seen.added)[:, None, None]
        cut = jnp.where(position >= read - self.settled, jnp.inf, cut)
        carried = jnp.broadcast_to(score, shape)
        return jnp.broadcast_to(cut, shape), {**seen.notes, CARRIED: carried}

    def chosen(self, seen: Seen, capacity: int) -> Chosen:
        found = super().chosen(seen, capacity)
        wanted = seen.valid & ((self.score(seen)[0] > -jnp.inf) | self.must(seen))
        lost = jnp.sum(wanted, axis=(1, 2)) - jnp.sum(found.there, axis=(1, 2))
        notes = {**found.notes, CAPPED: seen.notes[CAPPED] + lost.astype(jnp.int32)}
        return replace(found, notes=notes)

    @property
    def settled(self) -> int:
        """The window; that of the layer is known since `of_attention`."""
        assert self.window is not None
        return self.window

    def evicted(self, score: Float[Array, "*entry"]) -> Bool[Array, "*entry"]:
        """Return which entries are dropped beyond the window. score: of the entries"""
        return score < -self.threshold

    def until(
        self, score: Float[Array, "batch stores key"], position: Int[Array, "batch #stores key"]
    ) -> Int[Array, "batch stores key"]:
        return until(self.evicted(score), position, self.settled)

    def decided(
        self,
        score: Float[Array, "batch stores slot"],
        position: Int[Array, "batch stores slot"],
        there: Bool[Array, "batch heads slot"],
        newest: Entries,
    ) -> tuple[Float[Array, "batch stores slot"], Entries]:
        logits = newest.tensors[EVICTION][..., 0].astype(jnp.float32)
        first = jnp.where(there, -logits[..., :1], 0.0)
        if len(first[0]) != len(score[0]):
            first = jnp.sum(first, axis=1, keepdims=True)  # of the head that the entry belongs to
        score = jnp.where(position == newest.position[..., :1] - 1, first, score)
        own = -of_next(logits, -jnp.inf)
        last = self.until(own, newest.position)
        return score, replace(newest, until=last)
