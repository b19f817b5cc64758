"""Refine the scores of an eviction policy before entries are chosen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from mukv.cache.seen import Seen
from mukv.core.typing import Array, Float, Int


@dataclass(frozen=True)
class Refine:
    """Base class of functions from scores to scores."""

    has_budget: ClassVar[bool] = False
    needs_weights: ClassVar[bool] = False
    """Whether the output projection is used. The layer must then have a single one, and scores must
    not be negative."""
    before_sharing: ClassVar[bool] = False
    """Whether heads and layers share the budget by the refined scores, and not by the others."""

    def apply(
        self,
        score: Float[Array, "batch stores key"],
        seen: Seen,
        number: Int[Array, "batch #stores 1"],
    ) -> Float[Array, "batch stores key"]:
        """Return the new scores.

        score: inf for entries that are always kept and -inf for empty slots, both of which must be
            returned unchanged
        number: number of entries that each store keeps
        """
        raise NotImplementedError


def refined(
    score: Float[Array, "batch stores key"],
    seen: Seen,
    number: Int[Array, "batch #stores 1"],
    steps: Iterable[Refine],
) -> Float[Array, "batch stores key"]:
    """Apply refinements one after the other."""
    for step in steps:
        score = step.apply(score, seen, number)
    return score
