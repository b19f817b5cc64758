"""Keep only the entries whose score reaches a threshold, fewer than the budget allows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from mukv.cache.refine import Refine
from mukv.cache.seen import Seen
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float, Int


@dataclass(frozen=True)
class Threshold(Refine):
    """Drop entries whose score is below `least`, except those of the newest tokens (the rule of
    DMS, Łańcucki et al. 2025).

    Of the entries that reach it at most the budget is kept, the best ones, so that shapes are
    static. How many a text keeps follows from its scores.

    least: smallest score of an entry that is kept
    window: number of newest tokens whose entries are kept with any score
    """

    least: float = 0.0
    window: int = 128

    before_sharing: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not math.isfinite(self.least):
            raise BadInput("least", self.least, "a finite number")
        if self.window < 0:
            raise BadInput("window", self.window, "at least 0")

    def apply(
        self,
        score: Float[Array, "batch stores key"],
        seen: Seen,
        number: Int[Array, "batch #stores 1"],
    ) -> Float[Array, "batch stores key"]:
        return self.cut(score, seen.entries.position, seen.length + seen.added)

    def cut(
        self,
        score: Float[Array, "batch stores key"],
        position: Int[Array, "#batch #stores key"],
        read: Int[Array, " batch"],
    ) -> Float[Array, "batch stores key"]:
        """Return the scores, -inf below the threshold and inf in the window.

        position: of each entry. read: number of tokens of each row. A score of -inf stays.
        """
        newest = position >= read[:, None, None] - self.window
        kept = jnp.where(score >= self.least, score, -jnp.inf)
        return jnp.where(newest & (score > -jnp.inf), jnp.inf, kept)
