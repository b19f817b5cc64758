"""RMSNorm: division by the root mean square, times a gain (Zhang and Sennrich 2019).

With the mean subtracted before and a bias added after, it is LayerNorm (Ba et al. 2016).
"""

from __future__ import annotations

from collections.abc import Mapping
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
    """Root mean square norm (Zhang and Sennrich 2019): x / sqrt(mean(x ** 2) + epsilon) * gain.

    epsilon: number that is added to the mean square
    stored: what the weight holds: the gain itself ("gain"), or the gain minus one ("offset", as in
        Gemma)
    centred: subtract the mean before, and add a trained bias after: LayerNorm (Ba et al. 2016;
        GPT-2)
    """

    epsilon: float = 1e-6
    stored: Literal["gain", "offset"] = "gain"
    centred: bool = False

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise BadInput("epsilon", self.epsilon, "greater than 0")

    def params(self, width: int, axis: str = "embed") -> dict[str, Param]:
        """Declare the weight, named "gain" or "offset" as it is stored; the initial gain is 1. A
        centred norm also has a "bias", which is 0 at first.

        width: size of the normalised axis. axis: name of that axis.
        """
        return self.params_over({axis: width})

    def params_over(self, dims: Mapping[str, int]) -> dict[str, Param]:
        """Declare the weight of a norm over several axes, given by name and size."""
        initial: dict[str, Literal["ones", "zeros"]] = {"gain": "ones", "offset": "zeros"}
        declared = {self.stored: Param(dims, role="vector", init=initial[self.stored])}
        if self.centred:
            declared["bias"] = Param(dims, role="vector", init="zeros")
        return declared

    def apply(
        self, weights: dict[str, Any], x: Float[Array, "*batch width"]
    ) -> Float[Array, "*batch width"]:
        """Normalise x over its last axis, multiply by the gain and add the bias, in float32; the
        type of x is kept.
        """
        normed = self.unit(x.astype(jnp.float32)) * with_rank(self.gain(weights), x.ndim)
        if self.centred:
            normed = normed + with_rank(weights["bias"].astype(jnp.float32), x.ndim)
        return normed.astype(x.dtype)

    def apply_over(
        self, weights: dict[str, Any], x: Float[Array, "*batch heads head_dim"]
    ) -> Float[Array, "*batch heads head_dim"]:
        """Normalise x over its last two axes together and multiply by the gain of each element."""
        flat = {name: weight.reshape(-1) for name, weight in weights.items()}
        return self.apply(flat, x.reshape(*x.shape[:-2], -1)).reshape(x.shape)

    def gain(self, weights: dict[str, Any]) -> Float[Array, " width"]:
        """Return the gain that `apply` multiplies with; float32."""
        stored = weights[self.stored].astype(jnp.float32)
        return stored if self.stored == "gain" else 1 + stored

    def unit(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalise x over its last axis without a gain, in float32; the type of x is kept."""
        wide = x.astype(jnp.float32)
        if self.centred:
            wide = wide - jnp.mean(wide, axis=-1, keepdims=True)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(mean_square + self.epsilon)).astype(x.dtype)
