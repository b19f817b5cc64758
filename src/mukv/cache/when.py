"""When an eviction policy chooses entries. The default is at every fold."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from mukv.core.counts import require_counts
from mukv.core.typing import Array, Int


@dataclass(frozen=True)
class When:
    """Base class of the times at which entries are chosen. A prefill of an empty cache is always
    one of them."""

    has_budget: ClassVar[bool] = False
    holds: ClassVar[bool] = False
    """Whether all entries that follow the first choice are kept."""

    def room(self, length: int, after: int | None) -> tuple[int, int]:
        """Return the tokens to which a budget refers, and the entries that a store may hold beyond
        its budget.

        length: tokens that the cache has room for
        after: most tokens of a row that follow its prompt; None if that is not known
        """
        return length, 0

    def number(
        self, budget: Int[Array, " batch"], count: Int[Array, " batch"], room: int
    ) -> Int[Array, " batch"]:
        """Return how many entries a store keeps.

        budget: entries within the budget. count: entries before the choice. room: slots.
        """
        return budget


@dataclass(frozen=True)
class Folds(When):
    """Choose after each prefill and whenever a tail is folded."""


@dataclass(frozen=True)
class Hold(When):
    """Choose while the prompt is read, and never drop an entry after it (the protocol of kvpress:
    Devoto et al. 2025)."""

    holds: ClassVar[bool] = True

    def room(self, length: int, after: int | None) -> tuple[int, int]:
        if after is None:
            return length, length
        after = min(after, length)
        return length - after, after


@dataclass(frozen=True)
class Every(When):
    """Choose only when a store has this many entries more than its budget (decoding in kvpress:
    Devoto et al. 2025). A choice that comes with a fold is made by the queries of that fold's
    tokens.

    tokens: entries above the budget
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
