"""The budget of a policy: a fraction of the tokens read so far, or a number of entries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import jax.numpy as jnp

from mukv.core.errors import BadInput
from mukv.core.typing import Array, Int

FINEST = 1000
"""Largest denominator of a fraction, so that products with lengths are exact."""


@dataclass(frozen=True)
class CacheBudget:
    """Number of entries to keep or read.

    amount: a fraction (above 0, at most 1) or a whole number of entries (above 1)
    """

    amount: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.amount < math.inf or (self.amount > 1 and self.amount % 1):
            raise BadInput(
                "budget",
                self.amount,
                "a share above 0 and at most 1, or a whole number of entries above 1",
            )
        if self.amount <= 1 and not self._share:
            raise BadInput("budget", self.amount, f"a share of at least 1/{FINEST}")

    @property
    def everything(self) -> bool:
        """Whether the budget has no limit."""
        return self.amount == 1

    @property
    def _share(self) -> Fraction:
        return Fraction(self.amount).limit_denominator(FINEST)

    def of(self, length: int) -> int:
        """Return the number of entries for a static `length` in tokens."""
        if self.amount > 1:
            return min(int(self.amount), length)
        return int(length * self._share)

    def number(self, length: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """Return the number of entries for traced lengths in tokens."""
        if self.amount > 1:
            return jnp.minimum(length, int(self.amount))
        return length * self._share.numerator // self._share.denominator

    def total(self, length: int, stores: int) -> int:
        """Return the entries that several stores share, of `length` entries each: of a share, all
        but the dropped ones, whose number is rounded down (as in KVzip)."""
        if self.amount > 1:
            return stores * min(int(self.amount), length)
        return math.ceil(stores * length * self._share)

    def resized(self, entries: float, length: int) -> CacheBudget:
        """Return a budget of the same kind that is `entries` at `length`."""
        if self.amount > 1:
            return CacheBudget(float(max(round(entries), 2)))
        return CacheBudget(min(max(round(entries) / length, 1 / FINEST), 1.0))

    def __str__(self) -> str:
        return f"{self.amount:g}"


def portion(number: Int[Array, "*shape"], share: float, least: int) -> Int[Array, "*shape"]:
    """Return a share of traced numbers of entries, rounded down, but at least `least` unless the
    share is 0."""
    exact = Fraction(share).limit_denominator(FINEST)
    whole = number * exact.numerator // exact.denominator
    return jnp.maximum(whole, least) if share else whole
