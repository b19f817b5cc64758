"""Division by the root of the mean square, times a gain (Zhang and Sennrich 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from mukv.core.errors import BadInput
from mukv.core.params import Param
from mukv.core.typing import Array, Float


@dataclass(frozen=True)
class RMSNorm:
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise BadInput("epsilon", self.epsilon, "greater than 0")

    def params(self, width: int, axis: str = "embed") -> dict[str, Param]:
        return {"gain": Param({axis: width}, role="vector", init="ones")}

    def apply(
        self, weights: dict[str, Any], x: Float[Array, "*batch width"]
    ) -> Float[Array, "*batch width"]:
        normed = self.unit(x.astype(jnp.float32))
        return (normed * weights["gain"].astype(jnp.float32)).astype(x.dtype)

    def unit(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """The same without a gain; computed in float32, the type of x is kept."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
