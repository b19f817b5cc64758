"""Division by the root of the mean square, times a gain (Zhang and Sennrich 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mukv.core.broadcast import with_rank
from mukv.core.errors import BadInput
from mukv.core.params import Param
from mukv.core.typing import Array, Float


@dataclass(frozen=True)
class RMSNorm:
    """Root mean square norm (Zhang and Sennrich 2019).

    epsilon: added to the mean square
    stored: what the weight is: the gain, or its offset from one (Gemma)
    """

    epsilon: float = 1e-6
    stored: Literal["gain", "offset"] = "gain"

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise BadInput("epsilon", self.epsilon, "greater than 0")

    def params(self, width: int, axis: str = "embed") -> dict[str, Param]:
        """One weight, called as it is stored; the gain begins as one."""
        begins: dict[str, Literal["ones", "zeros"]] = {"gain": "ones", "offset": "zeros"}
        init = begins[self.stored]
        return {self.stored: Param({axis: width}, role="vector", init=init)}

    def apply(
        self, weights: dict[str, Any], x: Float[Array, "*batch width"]
    ) -> Float[Array, "*batch width"]:
        normed = self.unit(x.astype(jnp.float32))
        return (normed * with_rank(self.gain(weights), x.ndim)).astype(x.dtype)

    def gain(self, weights: dict[str, Any]) -> Float[Array, " width"]:
        """What `apply` multiplies with; float32."""
        stored = weights[self.stored].astype(jnp.float32)
        return stored if self.stored == "gain" else 1 + stored

    def unit(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """The same without a gain; computed in float32, the type of x is kept."""
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
