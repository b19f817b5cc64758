"""RoPE: queries and keys are rotated by angles proportional to their position (Su et al. 2021).

Pairs are (x[m], x[m + head_dim/2]), as in GPT-NeoX and Hugging Face's Llama; angles are computed
in float32. `Llama3` slows the low frequencies for contexts beyond those of training (Llama 3.1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float, Int
from mukv.position.base import Position


@dataclass(frozen=True)
class Llama3:
    """Wavelengths beyond original_length / low_frequency_factor are stretched by `factor`, those
    below original_length / high_frequency_factor are kept; linear in frequency between."""

    kind: Literal["llama3"] = "llama3"
    factor: float = 8.0
    low_frequency_factor: float = 1.0
    high_frequency_factor: float = 4.0
    original_length: int = 8192

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise BadInput("factor", self.factor, "at least 1")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise BadInput(
                "low_frequency_factor",
                self.low_frequency_factor,
                f"between 0 and high_frequency_factor ({self.high_frequency_factor})",
            )
        if self.original_length < 1:
            raise BadInput("original_length", self.original_length, "at least 1 token")

    def scale(self, frequency: np.ndarray) -> np.ndarray:
        """Radians per token, float64, before and after."""
        turns = self.original_length * frequency / (2 * math.pi)
        blend = (turns - self.low_frequency_factor) / (
            self.high_frequency_factor - self.low_frequency_factor
        )
        kept = np.clip(blend, 0, 1)
        return kept * frequency + (1 - kept) * frequency / self.factor


@dataclass(frozen=True)
class RoPE(Position):
    kind: Literal["rope"] = "rope"
    base: float = 10_000.0
    scaling: Llama3 | None = None

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise BadInput("base", self.base, "greater than 1")

    def check(self, head_dim: int, heads: int) -> None:
        if head_dim % 2:
            raise BadInput("head_dim", head_dim, "rope rotates pairs: an even number")

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Radians per token of each pair, fastest first: float64 [head_dim / 2]."""
        frequency = self.base ** -(np.arange(0, head_dim, 2) / head_dim)
        return self.scaling.scale(frequency) if self.scaling else frequency

    def rotate(
        self,
        x: Float[Array, "batch heads token head_dim"],
        position: Int[Array, "batch #heads token"],
    ) -> Float[Array, "batch heads token head_dim"]:
        frequency = jnp.asarray(self.frequencies(x.shape[-1]), jnp.float32)
        angle = position[..., None].astype(jnp.float32) * frequency
        cos, sin = jnp.cos(angle), jnp.sin(angle)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return rotated.astype(x.dtype)
