"""CoPE: positions count gated tokens instead of all tokens (Golovneva et al. 2024).

Every visible key has a gate g = sigmoid(q k). The position of a key is the sum of the gates from
that key up to the query, clipped at `positions` - 1. The bias of a logit is the query's product
with a row of a trained table, interpolated linearly between the two rows next to that position. All
heads of a layer share the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp

from mukv.core.errors import BadInput
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Weights
from mukv.position.base import Logits, Pairs, Position


@dataclass(frozen=True)
class CoPE(Position):
    """Contextual position encoding: positions count gated tokens.

    positions: rows of the table; larger counts are clipped
    scaled: true scales the table's products as the logits are scaled (the authors' code); false
        leaves them unscaled (the listing in their paper)
    """

    kind: Literal["cope"] = "cope"
    positions: int = 64
    scaled: bool = True

    def __post_init__(self) -> None:
        if self.positions < 2:
            raise BadInput("positions", self.positions, "at least 2")

    @property
    def biases(self) -> bool:
        return True

    @property
    def sequential(self) -> bool:
        return True

    def params(self, query_dim: int, heads: int) -> dict[str, Param]:
        dims = {"query_dim": query_dim, "positions": self.positions}
        return {"table": Param(dims, fan_in=("query_dim",), init="zeros")}

    def bias(self, weights: Weights, logits: Logits, pairs: Pairs) -> Logits:
        return self.bias_block(weights, logits, pairs, jnp.zeros(logits.shape[:-1]))[0]

    def bias_block(
        self,
        weights: Weights,
        logits: Logits,
        pairs: Pairs,
        after: Float[Array, "batch kv_heads group query"],
    ) -> tuple[Logits, Float[Array, "batch kv_heads group query"]]:
        """Compute `bias` of one block of keys. after: sum of the gates to the right of
        this block.
        """
        gates = jnp.where(pairs.visible[:, :, None], jax.nn.sigmoid(logits), 0.0)
        counted = _sum_from_right(gates, pairs) + after[..., None]
        count = jnp.minimum(counted, self.positions - 1.0)
        table = weights["table"].astype(pairs.query.dtype)
        value = jnp.einsum(
            "bgrqd,dp->bgrqp", pairs.query, table, preferred_element_type=jnp.float32
        )
        if not self.scaled:
            value = value / pairs.scale
        # The last row is repeated, so that the difference at the largest count is zero.
        step = jnp.diff(value, axis=-1, append=value[..., -1:])
        floor = jax.lax.stop_gradient(jnp.floor(count))
        row = floor.astype(jnp.int32)
        low = jnp.take_along_axis(value, row, axis=-1)
        slope = jnp.take_along_axis(step, row, axis=-1)
        return logits + low + (count - floor) * slope, after + jnp.sum(gates, axis=-1)


def _sum_from_right(gates: Array, pairs: Pairs) -> Array:
    """Sum for each key the gates from it to the newest key, in the order of positions."""
    if pairs.ordered:
        return jax.lax.cumsum(gates, axis=gates.ndim - 1, reverse=True)
    order = jnp.argsort(pairs.key_position, axis=-1)[:, :, None, None]
    summed = jax.lax.cumsum(
        jnp.take_along_axis(gates, jnp.broadcast_to(order, _like(gates, order)), axis=-1),
        axis=gates.ndim - 1,
        reverse=True,
    )
    back = jnp.argsort(order, axis=-1)
    return jnp.take_along_axis(summed, jnp.broadcast_to(back, _like(gates, back)), axis=-1)


def _like(gates: Array, index: Array) -> tuple[int, ...]:
    """Return the shape of an index into the last axis of the gates."""
    return (*gates.shape[:-1], index.shape[-1])
