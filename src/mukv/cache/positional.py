"""Eviction by position alone: StreamingLLM, and a random baseline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import jax.numpy as jnp

from mukv.cache.keep import Keep
from mukv.cache.seen import Score, Seen
from mukv.core.typing import Array, Bool


@dataclass(frozen=True)
class Streaming(Keep):
    """Keep the first `sinks` tokens and the most recent ones (Xiao et al. 2023).

    Entries keep their positions; they are not renumbered.

    sinks: number of first tokens that are kept
    """

    sinks: int = 4

    @property
    def minimum(self) -> int:
        return self.sinks + 1

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        return seen.entries.position.astype(jnp.float32), {}

    def must(self, seen: Seen) -> Bool[Array, "batch stores key"]:
        return seen.first(self.sinks) | seen.recent(1)


@dataclass(frozen=True)
class Random(Keep):
    """Score by a hash of the position: the random baseline.

    seed: number that the hash depends on
    """

    seed: int = 0

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        # MurmurHash3's finaliser: positions that differ in any bit get unrelated hashes.
        x = seen.entries.position.astype(jnp.uint32) + jnp.uint32(0x9E3779B9) * (self.seed + 1)
        for factor, shift in ((0x85EBCA6B, 16), (0xC2B2AE35, 13)):
            x = (x ^ (x >> shift)) * jnp.uint32(factor)
        return ((x ^ (x >> 16)) >> 8).astype(jnp.float32), {}
