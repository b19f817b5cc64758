"""How a model knows where a token stands. The default, in every method, is not to know.

A position encoding may rotate queries and keys (RoPE) or change logits (ALiBi, CoPE). Positions
count from the start of the document, not of the row, so packed documents are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Weights


@dataclass(frozen=True)
class Position:
    """The identity: all methods leave what they are given as it is."""

    @property
    def biases(self) -> bool:
        """Whether `bias` does anything, in which case a core must show the logits."""
        return False

    def check(self, head_dim: int, heads: int) -> None:
        """Raise BadInput if this encoding can't work with such heads."""

    def params(self, head_dim: int, heads: int) -> dict[str, Param]:
        """Weights of one layer."""
        return {}

    def rotate(
        self,
        x: Float[Array, "batch heads token head_dim"],
        position: Int[Array, "batch #heads token"],
    ) -> Float[Array, "batch heads token head_dim"]:
        """Queries or keys as seen from their positions; the type of x is kept."""
        return x

    def bias(
        self,
        weights: Weights,
        logits: Float[Array, "batch kv_heads group query key"],
        query: Float[Array, "batch kv_heads group query head_dim"],
        query_position: Int[Array, "batch 1 query"],
        key_position: Int[Array, "batch #kv_heads key"],
    ) -> Float[Array, "batch kv_heads group query key"]:
        """The scaled logits with what the distance adds to them."""
        return logits
