"""How much a policy may keep or read: a share of what was read, or a number of entries."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import jax.numpy as jnp

from mukv.core.errors import BadInput
from mukv.core.typing import Array, Int

FINEST = 1000
"""Shares are fractions with no larger denominator, so that counting by them is exact."""


@dataclass(frozen=True)
class CacheBudget:
    """amount: a share (above 0, at most 1) or a whole number of entries (above 1)."""

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
        return self.amount == 1

    @property
    def _share(self) -> Fraction:
        return Fraction(self.amount).limit_denominator(FINEST)

    def of(self, length: int) -> int:
        """Entries out of `length`."""
        if self.amount > 1:
            return min(int(self.amount), length)
        return int(length * self._share)

    def number(self, length: Int[Array, " batch"]) -> Int[Array, " batch"]:
        """The same for lengths that are data."""
        if self.amount > 1:
            return jnp.minimum(length, int(self.amount))
        return length * self._share.numerator // self._share.denominator

    def pyramid(self, place: int, layers: int, steepness: int = 20) -> CacheBudget:
        """That of one of `layers` layers, falling evenly from the first to the last, whose mean is
        this one (PyramidKV, Cai et al. 2024: the last has 1 / steepness of it)."""
        if layers == 1:
            return self
        share = self.amount <= 1
        widest = self.amount * (2 - 1 / steepness)
        widest = min(widest, 1.0) if share else widest
        amount = widest - place / (layers - 1) * 2 * (widest - self.amount)
        return CacheBudget(max(amount, 1 / FINEST) if share else float(max(round(amount), 2)))

    def __str__(self) -> str:
        return f"{self.amount:g}"
