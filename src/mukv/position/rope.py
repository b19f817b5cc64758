"""RoPE: rotate queries and keys by angles proportional to position (Su et al. 2021).

`pairing` says which dimensions form a pair: "half" is (x[m], x[m + d/2]) (GPT-NeoX, Hugging Face),
"interleaved" is (x[2m], x[2m + 1]) (Meta's Llama, DeepSeek). The two differ only in the order of
each head's dimensions. Angles are computed in float32.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np

from mukv.core.broadcast import with_rank
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float, Int
from mukv.position.base import Position
from mukv.position.rope_scaling import AnyScaling


@dataclass(frozen=True)
class RoPE(Position):
    """Rotary position encoding.

    base: pair m of a head with d rotated dimensions turns by base ** (-2m / d) radians per token
    scaling: change of the frequencies for longer contexts; None means none
    pairing: which dimensions form a pair: m and m + d/2 (half), or 2m and 2m + 1 (interleaved)
    partial: fraction of a head's dimensions that is rotated, with the frequencies of a head of that
        width (GPT-NeoX)
    p: fraction of the pairs, highest frequencies first, that is rotated; the other pairs have
        frequency zero (p-RoPE, Barbero et al. 2024; Gemma 4)
    """

    kind: Literal["rope"] = "rope"
    base: float = 10_000.0
    scaling: AnyScaling | None = None
    pairing: Literal["half", "interleaved"] = "half"
    partial: float = 1.0
    p: float = 1.0

    def __post_init__(self) -> None:
        if self.base <= 1:
            raise BadInput("base", self.base, "greater than 1")
        for name in ("partial", "p"):
            if not 0 <= getattr(self, name) <= 1:
                raise BadInput(name, getattr(self, name), "between 0 and 1")

    @property
    def logit_factor(self) -> float:
        return self.scaling.logit_factor if self.scaling else 1.0

    def rotation(self) -> Hashable:
        return self

    def check(self, rotated_dim: int, heads: int) -> None:
        if self._width(rotated_dim) % 2:
            raise BadInput(
                "head_dim",
                rotated_dim,
                "an even number, because rope rotates pairs"
                + (f" (of {self.partial} of the dimensions)" if self.partial < 1 else ""),
            )

    def _width(self, head_dim: int) -> int:
        """Return the number of dimensions that are rotated."""
        return int(self.partial * head_dim)

    def frequencies(self, head_dim: int) -> np.ndarray:
        """Compute the radians per token of each pair, highest first: float32 [pair].

        The power and the reciprocal are rounded one after the other, as in the code that published
        models were trained with; other roundings differ by 1e-3 radians after 9,000 tokens.
        """
        width = self._width(head_dim)
        exponent = (np.arange(0, width, 2) / max(width, 1)).astype(np.float32)
        period = (self.base ** exponent.astype(np.float64)).astype(np.float32)
        frequency = np.float32(1) / period
        if self.scaling:
            frequency = self.scaling.scale(frequency, self.base)
        turning = np.arange(len(frequency)) < int(self.p * width / 2)
        return np.where(turning, frequency, np.float32(0))

    def rotate(
        self,
        x: Float[Array, "batch heads token rotated_dim"],
        position: Int[Array, "batch #heads token"],
    ) -> Float[Array, "batch heads token rotated_dim"]:
        frequency = self.frequencies(x.shape[-1])
        if not frequency.any():
            return x
        factor = self.scaling.rotation_factor if self.scaling else 1.0
        angle = position[..., None].astype(jnp.float32) * with_rank(jnp.asarray(frequency), 4)
        cos, sin = jnp.cos(angle) * factor, jnp.sin(angle) * factor
        width = 2 * len(frequency)
        wide, rest = x[..., :width].astype(jnp.float32), x[..., width:]
        if self.pairing == "half":
            first, second = jnp.split(wide, 2, axis=-1)
        else:
            first, second = wide[..., 0::2], wide[..., 1::2]
        turned = (first * cos - second * sin, second * cos + first * sin)
        if self.pairing == "half":
            rotated = jnp.concatenate(turned, axis=-1)
        else:
            rotated = jnp.stack(turned, axis=-1).reshape(wide.shape)
        rotated = rotated.astype(x.dtype)
        return rotated if width == x.shape[-1] else jnp.concatenate([rotated, rest], axis=-1)
