"""NoPE: no position encoding; only the causal mask carries order (Kazemnejad et al. 2023).

Attention over n tokens becomes flatter as n grows. An optional temperature multiplies queries by a
factor that grows with their position: `LogLength` by g ln(n) with a trained g per head (SSMax,
Nakanishi 2025), `StepLength` by 1 + strength ln(1 + floor(n / every)) (Llama 4's layers without
RoPE).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Weights
from mukv.position.base import Position


@dataclass(frozen=True)
class LogLength:
    """Trained logarithmic temperature: g ln(n), with a trained g per head.

    typical: length (tokens) at which the initial factor is 1: g starts as 1 / ln(typical)
    """

    kind: Literal["log_length"] = "log_length"
    typical: int = 256

    def __post_init__(self) -> None:
        if self.typical < 2:
            raise BadInput("typical", self.typical, "at least 2 tokens")

    def params(self, heads: int) -> dict[str, Param]:
        """Declare the weights: `sharpness`, which is g ln(typical), per query head."""
        return {"sharpness": Param({"heads": heads}, role="vector", init="ones")}

    def factor(
        self, weights: Weights, position: Int[Array, "batch query"]
    ) -> Float[Array, "batch heads query"]:
        """Compute the factor of each head's queries at 0-based positions (tokens), float32."""
        length = jnp.log(position + 1.0)[:, None] / jnp.log(self.typical)
        return weights["sharpness"].astype(jnp.float32)[None, :, None] * length


@dataclass(frozen=True)
class StepLength:
    """Fixed temperature that grows in steps: 1 + strength ln(1 + floor(n / every)).

    every: tokens per step
    strength: factor of the logarithm; 0 means no temperature
    """

    kind: Literal["step_length"] = "step_length"
    every: int = 8192
    strength: float = 0.1

    def __post_init__(self) -> None:
        require_counts(self, "every", unit="token")
        if self.strength < 0:
            raise BadInput("strength", self.strength, "at least 0")

    def params(self, heads: int) -> dict[str, Param]:
        """Declare no weights."""
        return {}

    def factor(
        self, weights: Weights, position: Int[Array, "batch query"]
    ) -> Float[Array, "batch 1 query"]:
        """Compute the factor of queries at 0-based positions (tokens), float32, the same for all
        heads.
        """
        steps = (position + 1) // self.every
        return 1 + self.strength * jnp.log(1.0 + steps)[:, None]


@dataclass(frozen=True)
class NoPE(Position):
    """No position encoding.

    temperature: scaling of queries by their position; None means none
    """

    kind: Literal["nope"] = "nope"
    temperature: LogLength | StepLength | None = None

    def params(self, query_dim: int, heads: int) -> dict[str, Param]:
        return self.temperature.params(heads) if self.temperature else {}

    def temper(
        self,
        weights: Weights,
        query: Float[Array, "batch kv_heads group query query_dim"],
        position: Int[Array, "batch query"],
    ) -> Float[Array, "batch kv_heads group query query_dim"]:
        if self.temperature is None:
            return query
        factor = self.temperature.factor(weights, position)
        batch, kv_heads, group, length, _ = query.shape
        shape = (batch, kv_heads, group) if factor.shape[1] > 1 else (batch, 1, 1)
        return (query * factor.reshape(*shape, length, 1)).astype(query.dtype)
