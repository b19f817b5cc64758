"""FIRE: a small MLP maps normalised distance to a bias per head (Li et al. 2023).

bias = MLP(psi(distance) / psi(max(query position, threshold))) with psi(x) = ln(|c| x + 1); c and
the threshold are trained. Distances are normalised by the query's position, so that texts longer
than those of training give inputs in the same range.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from mukv.core.broadcast import with_rank
from mukv.core.counts import require_counts
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Weights
from mukv.position.base import Logits, Pairs, Position

EPSILON = 1e-6
CURVE = 0.1
"""Initial value of c; the trained weight `curve` multiplies it."""


@dataclass(frozen=True)
class FIRE(Position):
    """Add to the logits a trained function (an MLP) of the normalised distance.

    hidden: hidden width of the MLP
    threshold: initial value of the trained threshold (tokens): query positions below it are
        normalised by the threshold
    """

    kind: Literal["fire"] = "fire"
    hidden: int = 32
    threshold: int = 512

    def __post_init__(self) -> None:
        require_counts(self, "hidden", most=1 << 16)
        require_counts(self, "threshold")

    @property
    def biases(self) -> bool:
        return True

    def params(self, query_dim: int, heads: int) -> dict[str, Param]:
        scalar = Param({"scalar": 1}, role="vector", init="ones")
        return {
            "curve": scalar,
            "threshold": scalar,
            "into": Param({"scalar": 1, "position_hidden": self.hidden}),
            "into_bias": Param({"position_hidden": self.hidden}, role="vector", init="zeros"),
            "out": Param(
                {"position_hidden": self.hidden, "heads": heads}, fan_in=("position_hidden",)
            ),
        }

    def bias(self, weights: Weights, logits: Logits, pairs: Pairs) -> Logits:
        wide = {name: weight.astype(jnp.float32) for name, weight in weights.items()}

        def psi(tokens: Array) -> Array:
            return jnp.log1p(jnp.abs(CURVE * wide["curve"][0]) * tokens)

        distance = jnp.maximum(pairs.distance(), 0).astype(jnp.float32)[:, :, 0]
        least = jnp.abs(wide["threshold"][0] * self.threshold)
        position = pairs.query_position[:, None, :, None].astype(jnp.float32)
        share = psi(distance) / (psi(jnp.maximum(position, least)) + EPSILON)
        into, bias = (with_rank(wide[name], 5) for name in ("into", "into_bias"))
        inner = jax.nn.relu(share[..., None] * into + bias)
        per_head: Float[Array, "batch #kv_heads query key heads"] = inner @ wide["out"]
        _, kv_heads, group, _, _ = logits.shape
        if per_head.shape[1] == 1:
            grouped = jnp.moveaxis(per_head[:, 0], -1, 1)
            grouped = grouped.reshape(-1, kv_heads, group, *grouped.shape[2:])
        else:
            # Every KV head has its own entries: select the biases of that head's own query heads.
            split = per_head.reshape(*per_head.shape[:-1], kv_heads, group)
            grouped = jnp.einsum("bgqkgr->bgrqk", split)
        return logits + grouped
