"""Gated DeltaNet (Yang et al. 2024; the linear attention of Qwen3-Next, Qwen 3.5, Olmo Hybrid)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.attention.delta_layer import FLOAT32, DeltaLayer, check_key_heads, decayed
from mukv.core.counts import require_counts
from mukv.core.linear import project
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Residual, Weights


@dataclass(frozen=True)
class GatedDelta(DeltaLayer):
    """Gated DeltaNet: a delta rule whose state decays by one factor per head and token.

    key_heads: number of query and key heads, each for heads / key_heads states; None for `heads`
    head_value_dim: width of a value; head_dim if None
    beta: upper bound of the update's factor, the share of (value - value that the key reads) that a
        token writes; 2 allows negative eigenvalues of the transition (Grazzi et al. 2024; Olmo
        Hybrid)
    """

    kind: Literal["gated_delta"] = "gated_delta"
    key_heads: int | None = None
    head_value_dim: int | None = None
    beta: Literal[1, 2] = 1

    also: ClassVar[tuple[str, ...]] = ("gdn",)

    grows = ("heads", "key_heads")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "key_heads", "head_value_dim", most=1 << 16)
        check_key_heads(self.heads, self.key_heads)

    @property
    def query_heads(self) -> int:
        return self.key_heads or self.heads

    @property
    def value_dim(self) -> int:
        return self.head_value_dim or self.head_dim

    def write_params(self, d_model: int) -> dict[str, Any]:
        heads = {"delta_heads": self.heads}
        return {
            **super().write_params(d_model),
            "decay": Param({"embed": d_model, **heads}, fan_in=("embed",)),
            "step": Param(heads, role="vector", init="decay_steps"),
        }

    def read_params(self, d_model: int) -> dict[str, Any]:
        gate = Param({"embed": d_model, **self.widths["value"]}, fan_in=("embed",), tag="gate")
        return {**super().read_params(d_model), "gate": gate}

    def decay(self, weights: Weights, x: Residual) -> Float[Array, "batch token heads 1"]:
        step = project(x, weights["decay"], out=FLOAT32)
        step = step + weights["step"].astype(jnp.float32)[None, None]
        return decayed(weights, step[..., None])

    def strength(self, weights: Weights, x: Residual) -> Float[Array, "batch token heads"]:
        return self.beta * super().strength(weights, x)

    def gate(self, weights: Weights, x: Residual) -> Float[Array, "batch token heads value_dim"]:
        return jax.nn.silu(project(x, weights["gate"], out=FLOAT32))
