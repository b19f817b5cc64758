"""KERPLE, logarithmic form: logits fall with the logarithm of distance (Chi et al. 2022).

Head h subtracts p_h ln(1 + a_h distance). Trained p and a are clipped below at 0.01. Both start at
1, the mean of the paper's initial p and the upper bound of its initial a.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from mukv.core.params import Param
from mukv.core.typing import Weights
from mukv.position.base import Logits, Pairs, Position

SMALLEST = 0.01


@dataclass(frozen=True)
class KERPLE(Position):
    """Lower logits with the logarithm of distance, by two trained numbers per head: `strength` (p)
    and `rate` (a)."""

    kind: Literal["kerple"] = "kerple"

    @property
    def biases(self) -> bool:
        return True

    def params(self, query_dim: int, heads: int) -> dict[str, Param]:
        per_head = Param({"heads": heads}, role="vector", init="ones")
        return {"strength": per_head, "rate": per_head}

    def bias(self, weights: Weights, logits: Logits, pairs: Pairs) -> Logits:
        _, kv_heads, group, _, _ = logits.shape

        def per_head(name: str) -> Logits:
            raw = weights[name].astype(jnp.float32)
            return jnp.maximum(raw, SMALLEST).reshape(1, kv_heads, group, 1, 1)

        distance = jnp.maximum(pairs.distance(), 0).astype(jnp.float32)
        return logits - per_head("strength") * jnp.log1p(per_head("rate") * distance)
