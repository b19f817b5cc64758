"""What surrounds attention in a layer: normalisation, the MLP, the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Residual, Weights

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=True)}


@dataclass(frozen=True)
class Gated:
    """Gated linear unit (Shazeer 2020): down(activation(gate x) * up x)."""

    kind: Literal["gated"] = "gated"
    hidden: int = 128
    activation: Literal["silu", "gelu"] = "silu"

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise BadInput("hidden", self.hidden, "at least 1")

    def params(self, d_model: int) -> dict[str, Param]:
        up = Param({"embed": d_model, "hidden": self.hidden}, fan_in=("embed",))
        down = Param({"hidden": self.hidden, "embed": d_model}, fan_in=("hidden",))
        return {"gate": up, "up": up, "down": down}

    def apply(self, weights: Weights, x: Residual) -> Residual:
        gate = ACTIVATIONS[self.activation](project(x, weights["gate"]))
        return project(gate * project(x, weights["up"]), weights["down"])


@dataclass(frozen=True)
class RMSNorm:
    """Division by the root of the mean square, times a gain (Zhang and Sennrich 2019)."""

    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.epsilon <= 0:
            raise BadInput("epsilon", self.epsilon, "greater than 0")

    def params(self, width: int, axis: str = "embed") -> dict[str, Param]:
        return {"gain": Param({axis: width}, role="vector", init="ones")}

    def apply(
        self, weights: dict[str, Any], x: Float[Array, "*batch width"]
    ) -> Float[Array, "*batch width"]:
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        return (normed * weights["gain"].astype(jnp.float32)).astype(x.dtype)
