"""Kimi Delta Attention (Kimi Linear, Kimi team 2025): a delta rule with a decay per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.attention.delta_layer import FLOAT32, DeltaLayer, decayed
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param, Tag
from mukv.core.typing import Array, Float, Residual, Weights


@dataclass(frozen=True)
class KimiDelta(DeltaLayer):
    """Kimi Delta Attention: a delta rule in which each channel of a key has its own decay.

    Decays and the output gate are projected through a latent as wide as a head.

    decay_floor: lower bound of the log decay of a token, such as -5: the log decay is decay_floor *
        sigmoid(exp(rate) step); None for -exp(rate) softplus(step), which has no lower bound
    """

    kind: Literal["kimi_delta"] = "kimi_delta"
    decay_floor: float | None = None

    also: ClassVar[tuple[str, ...]] = ("kda",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay_floor is not None and self.decay_floor >= 0:
            raise BadInput("decay_floor", self.decay_floor, "less than 0, or null")

    def write_params(self, d_model: int) -> dict[str, Any]:
        channels = {"delta_heads": self.heads, "delta_dim": self.head_dim}
        return {
            **super().write_params(d_model),
            "decay": self._latent(d_model, channels),
            "step": Param(channels, role="vector", init="decay_steps"),
        }

    def read_params(self, d_model: int) -> dict[str, Any]:
        gate = self._latent(d_model, self.widths["value"], tag="gate")
        return {**super().read_params(d_model), "gate": gate}

    def decay(self, weights: Weights, x: Residual) -> Float[Array, "batch token heads head_dim"]:
        step = self._through(weights["decay"], x)
        step = step + weights["step"].astype(jnp.float32)[None, None]
        if self.decay_floor is None:
            return decayed(weights, step)
        rate = jnp.exp(weights["rate"].astype(jnp.float32))[None, None, :, None]
        return self.decay_floor * jax.nn.sigmoid(rate * step)

    def gate(self, weights: Weights, x: Residual) -> Float[Array, "batch token heads value_dim"]:
        return jax.nn.sigmoid(self._through(weights["gate"], x))

    def _latent(
        self, d_model: int, dims: dict[str, int], tag: Tag | None = None
    ) -> dict[str, Param]:
        """Declare the two weights of a projection through a latent."""
        latent = {"delta_latent": self.head_dim}
        return {
            "down": Param({"embed": d_model, **latent}, fan_in=("embed",)),
            "up": Param(latent | dims, fan_in=tuple(latent), tag=tag),
        }

    def _through(self, weights: Weights, x: Residual) -> Float[Array, "batch token heads width"]:
        """Project tokens through the latent, to float32."""
        return project(project(x, weights["down"]), weights["up"], out=FLOAT32)
