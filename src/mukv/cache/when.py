"""Define when a policy chooses the entries that it keeps. By default it chooses at every fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from mukv.core.counts import require_counts
from mukv.core.typing import Array, Int


@dataclass(frozen=True)
class When:
    """Base class of the rules for when entries are chosen. A prefill of an empty cache always
    chooses."""

    has_budget: ClassVar[bool] = False
    holds: ClassVar[bool] = False
    """Whether all entries are kept that are written after the prompt."""

    def room(self, length: int, after: int | None) -> tuple[int, int]:
        """Return the number of tokens to which a fractional budget refers, and the number of
        entries that a store may hold in addition to its budget.

        length: number of tokens that the cache has room for
        after: largest number of tokens of a row that follow its prompt; None if it is unknown
        """
        return length, 0

    def number(
        self, budget: Int[Array, " batch"], count: Int[Array, " batch"], room: int
    ) -> Int[Array, " batch"]:
        """Return how many entries a store keeps.

        budget: number of entries of the budget
        count: number of entries before the choice
        room: number of slots of the store
        """
        return budget


@dataclass(frozen=True)
class Folds(When):
    """Choose after each prefill, and at each fold of the tail during decoding."""


@dataclass(frozen=True)
class Hold(When):
    """Choose only while the prompt is prefilled, and keep all entries that are written after it
    (the protocol of kvpress, Devoto et al. 2025)."""

    holds: ClassVar[bool] = True

    def room(self, length: int, after: int | None) -> tuple[int, int]:
        if after is None:
            return length, length
        after = min(after, length)
        return length - after, after


@dataclass(frozen=True)
class Every(When):
    """Choose only when a store has `tokens` entries more than its budget (decoding in kvpress,
    Devoto et al. 2025). A choice at a fold is scored by the queries of the folded tokens.

    tokens: number of entries above the budget
    """

    tokens: int = 512

    def __post_init__(self) -> None:
        require_counts(self, "tokens", most=1 << 20)

    def room(self, length: int, after: int | None) -> tuple[int, int]:
        return length, self.tokens

    def number(
        self, budget: Int[Array, " batch"], count: Int[Array, " batch"], room: int
    ) -> Int[Array, " batch"]:
        return jnp.where(count >= budget + self.tokens, budget, room)
