"""Eviction by keys alone, without queries."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from mukv.cache.keep import Keep
from mukv.cache.seen import Score, Seen
from mukv.core.typing import Array


@dataclass(frozen=True)
class KeyNorm(Keep):
    """Score: -|k|, so that short keys are kept (Devoto et al. 2024)."""

    signed: ClassVar[bool] = True

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        return -jnp.linalg.norm(seen.keys(), axis=-1), {}


@dataclass(frozen=True)
class KeyDiff(Keep):
    """Score: -cos(k, mean of k / |k|), so that keys far from the mean direction are kept (Park et
    al. 2025).
    """

    signed: ClassVar[bool] = True

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        key = seen.keys()
        unit = key / jnp.maximum(jnp.linalg.norm(key, axis=-1, keepdims=True), 1e-12)
        there = seen.valid[..., None]
        # The length of the mean does not change the order of scores.
        mean = jnp.sum(jnp.where(there, unit, 0.0), axis=2, keepdims=True)
        mean = mean / jnp.maximum(jnp.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
        return -jnp.sum(unit * mean, axis=-1), {}
