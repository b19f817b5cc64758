"""Eviction by position alone: StreamingLLM, and a random baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax.numpy as jnp

from mukv.cache.keep import Keep, Sinking
from mukv.cache.seen import Score, Seen
from mukv.core.typing import Array, UInt32


@dataclass(frozen=True)
class Streaming(Sinking):
    """Keep the first tokens and the most recent ones (Xiao et al. 2023).

    Entries keep their positions; they are not renumbered.
    """

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        return seen.entries.position.astype(jnp.float32), {}


@dataclass(frozen=True)
class Random(Keep):
    """Score by a hash of layer, head and position: the random baseline.

    seed: number that the hash depends on
    """

    seed: int = 0

    def of_layer(self, place: int, layers: int, length: int) -> Keep:
        budget = super().of_layer(place, layers, length).budget
        return replace(self, budget=budget, seed=self.seed * layers + place)

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        heads = seen.reader.attention.key_heads
        position = seen.entries.position.astype(jnp.uint32)
        x = _hashed(jnp.uint32(self.seed % (1 << 32)))
        x = _hashed(x + jnp.arange(heads, dtype=jnp.uint32))[None, :, None]
        x = _hashed(x + position)
        return (x >> 8).astype(jnp.float32), {}


def _hashed(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Apply MurmurHash3's finaliser: numbers that differ in any bit get unrelated hashes."""
    for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
        x = (x ^ (x >> shift)) * jnp.uint32(factor)
    return x ^ (x >> 16)
