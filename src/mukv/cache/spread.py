"""Distribute the budget over layers and heads. The default is the same in every layer and head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from mukv.cache.budget import CacheBudget, portion
from mukv.cache.rank import places
from mukv.cache.refine import Refine, refined
from mukv.cache.seen import Seen
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float, Int

Rank = Float[Array, "batch stores key"]
"""Score of each entry in the order in which they are kept; inf for those that must be kept, -inf
for empty slots."""


@dataclass(frozen=True)
class Spread:
    """Base class of distributions of the budget."""

    has_budget: ClassVar[bool] = False
    pools: ClassVar[bool] = False
    """Whether the heads of a layer share one pool of entries."""
    over_layers: ClassVar[bool] = False
    """Whether layers share one budget, so that their pools differ in size."""

    def of_layer(
        self, budget: CacheBudget, place: int, layers: int, length: int, least: int
    ) -> CacheBudget:
        """Return the budget of layer `place` of `layers`.

        length: capacity of the cache in tokens
        least: smallest number of entries of a layer
        """
        return budget

    def ranked(
        self, own: Float[Array, "batch sets key"], seen: Seen, steps: tuple[Refine, ...]
    ) -> tuple[Rank, Int[Array, " batch"]]:
        """Return the rank of each entry in its store, and how many entries each store keeps.

        own: score of each entry in its store, or in each head if `pools` is true; inf for entries
            that must be kept, -inf for empty slots
        steps: refinements of the scores
        """
        return refined(own, seen, seen.number[:, None, None], steps), seen.number


@dataclass(frozen=True)
class Uniform(Spread):
    """Give each layer and head the same budget."""


@dataclass(frozen=True)
class Pyramid(Spread):
    """Give early layers more than late ones, falling linearly (PyramidKV, Cai et al. 2024).

    The last layer keeps 1 / beta of the budget and the first one 2 - 1 / beta of it, but at most
    the length less the window of the policy. If the last layer would keep fewer entries than that
    window, all layers get the same budget, as in kvpress.

    beta: ratio of the budget to that of the last layer
    """

    beta: float = 20.0

    def __post_init__(self) -> None:
        if self.beta < 1:
            raise BadInput("beta", self.beta, "at least 1")

    def of_layer(
        self, budget: CacheBudget, place: int, layers: int, length: int, least: int
    ) -> CacheBudget:
        if layers == 1:
            return budget
        mean = budget.amount if budget.amount > 1 else budget.amount * length
        narrowest = mean / self.beta
        widest = 2 * mean - narrowest
        if widest >= length - least:
            widest = length - least
            narrowest = 2 * mean - widest
        if not length >= widest >= narrowest >= least:
            return budget
        return budget.resized(widest - place * (widest - narrowest) / (layers - 1), length)


@dataclass(frozen=True)
class Adaptive(Spread):
    """Let the heads of a layer share one budget, so that heads with flat attention keep more
    (AdaKV, Feng et al. 2024).

    floor: fraction of its uniform budget that each head keeps at least, and at least one entry; 0
        for no minimum
    """

    floor: float = 0.2

    pools: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise BadInput("floor", self.floor, "a share from 0 to 1")

    def ranked(
        self, own: Float[Array, "batch sets key"], seen: Seen, steps: tuple[Refine, ...]
    ) -> tuple[Rank, Int[Array, " batch"]]:
        number = seen.number * own.shape[1]
        least = portion(seen.number, self.floor, least=1)[:, None, None]
        # The floor of a head includes the entries that must be kept: their rank is highest.
        there = own > -jnp.inf
        safe = there & (places(own) < least)
        pool = pooled(jnp.where(safe, jnp.inf, own))
        if not steps:
            return pool, number
        # Unrefined scores decide how many entries each head keeps; refined scores decide which.
        kept = there & (places(pool) < number[:, None, None])
        count = jnp.sum(kept, axis=-1, keepdims=True)
        best = places(refined(own, seen, count, steps)) < count
        return pooled(jnp.where(best & there, jnp.inf, -jnp.inf)), number


def pooled(own: Float[Array, "batch heads key"]) -> Rank:
    """Return the rank of each entry in the head that it belongs to; in other heads it is -inf."""
    return jnp.max(own, axis=1, keepdims=True)
