"""How a model knows where a token stands. The default, in every method, is not to know.

A position encoding may rotate queries and keys (RoPE), change logits (ALiBi, CoPE) or sharpen
queries with the length of the text. Positions count from the start of the document, not of the
row, so packed documents are alike.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from mukv.core.params import Param
from mukv.core.typing import Array, Bool, Float, Int, Weights


@dataclass(frozen=True)
class Pairs:
    """What a bias may look at besides the logits.

    query: as multiplied with keys, times `scale`. visible: which pairs the mask leaves.
    ordered: keys stand in the order of their positions (a ring that wraps does not).
    """

    query: Float[Array, "batch kv_heads group query query_dim"]
    query_position: Int[Array, "batch query"]
    key_position: Int[Array, "batch #kv_heads key"]
    visible: Bool[Array, "batch #kv_heads query key"]
    ordered: bool
    scale: float

    def distance(self) -> Int[Array, "batch #kv_heads 1 query key"]:
        """How far back each key lies; never negative where a pair is visible."""
        position = self.query_position[:, None, None, :, None]
        return position - self.key_position[:, :, None, None, :]


Logits = Float[Array, "batch kv_heads group query key"]


@dataclass(frozen=True)
class Position:
    """The identity: all methods leave what they are given as it is."""

    @property
    def biases(self) -> bool:
        """Whether `bias` does anything, in which case a core must show the logits."""
        return False

    @property
    def sequential(self) -> bool:
        """Whether `bias` needs to know what lies between a query and a key."""
        return False

    @property
    def logit_factor(self) -> float:
        """Multiplies the scale of the logits."""
        return 1.0

    def rotation(self) -> Hashable:
        """What `rotate` puts into a key: layers that share rotated keys must agree on it."""
        return None

    def check(self, rotated_dim: int, heads: int) -> None:
        """Raise BadInput if this encoding can't work with such heads."""

    def params(self, query_dim: int, heads: int) -> dict[str, Param]:
        """Weights of one layer."""
        return {}

    def rotate(
        self,
        x: Float[Array, "batch heads token rotated_dim"],
        position: Int[Array, "batch #heads token"],
    ) -> Float[Array, "batch heads token rotated_dim"]:
        """Queries or keys as seen from their positions; the type of x is kept."""
        return x

    def temper(
        self,
        weights: Weights,
        query: Float[Array, "batch kv_heads group query query_dim"],
        position: Int[Array, "batch query"],
    ) -> Float[Array, "batch kv_heads group query query_dim"]:
        """Queries as sharp as the length of what they look back on asks for."""
        return query

    def bias(self, weights: Weights, logits: Logits, pairs: Pairs) -> Logits:
        """The scaled logits with what position adds to them; float32."""
        return logits

    def bias_block(
        self,
        weights: Weights,
        logits: Logits,
        pairs: Pairs,
        after: Float[Array, "batch kv_heads group query"],
    ) -> tuple[Logits, Float[Array, "batch kv_heads group query"]]:
        """`bias` of a block of keys, for a core that goes through the blocks right to left.

        after: what the blocks to the right of this one have left to know, zeros at first.
        """
        return self.bias(weights, logits, pairs), after
