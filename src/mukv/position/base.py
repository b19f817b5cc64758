"""The interface of position encodings.

A position encoding may rotate queries and keys (RoPE), change logits (ALiBi, CoPE, FIRE, KERPLE) or
scale queries by a temperature that depends on their position (NoPE). Every method of the base class
leaves its input unchanged. Positions count from the start of the document, not of the row, so a
document gets the same positions alone and packed with others.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from mukv.core.params import Param
from mukv.core.table import Part
from mukv.core.typing import Array, Bool, Float, Int, Weights


@dataclass(frozen=True)
class Pairs:
    """Inputs of `Position.bias` besides the logits, for every pair of a query and a key.

    query: queries as they are multiplied with keys, already scaled by `scale`
    query_position: position of each query in its document, in tokens
    key_position: position of each key in its document, in tokens
    visible: true where the mask lets the query attend to the key
    ordered: whether keys lie in the order of their positions (false for a ring buffer that has
        wrapped)
    scale: factor that the queries were multiplied with
    """

    query: Float[Array, "batch kv_heads group query query_dim"]
    query_position: Int[Array, "batch query"]
    key_position: Int[Array, "batch #kv_heads key"]
    visible: Bool[Array, "batch #kv_heads query key"]
    ordered: bool
    scale: float

    def distance(self) -> Int[Array, "batch #kv_heads 1 query key"]:
        """Return query position minus key position, in tokens; never negative where a pair is
        visible.
        """
        position = self.query_position[:, None, None, :, None]
        return position - self.key_position[:, :, None, None, :]


Logits = Float[Array, "batch kv_heads group query key"]


@dataclass(frozen=True)
class Position(Part):
    """Base class of position encodings. Its own methods leave their inputs unchanged."""

    @property
    def biases(self) -> bool:
        """Whether `bias` changes logits; if so, the attention core must compute them explicitly."""
        return False

    @property
    def sequential(self) -> bool:
        """Whether `bias` of a pair depends on the keys between the query and the key."""
        return False

    @property
    def logit_factor(self) -> float:
        """Factor that multiplies the scale of the logits."""
        return 1.0

    def rotation(self) -> Hashable:
        """Return what determines the rotation of a key; layers that share rotated keys must have
        equal values. None means that keys are not rotated.
        """
        return None

    def check(self, rotated_dim: int, heads: int) -> None:
        """Raise BadInput if this encoding can't work with heads of this width or number.

        rotated_dim: dimensions per head that `rotate` receives
        heads: query heads
        """

    def params(self, query_dim: int, heads: int) -> dict[str, Param]:
        """Declare the trained weights of one layer."""
        return {}

    def rotate(
        self,
        x: Float[Array, "batch heads token rotated_dim"],
        position: Int[Array, "batch #heads token"],
    ) -> Float[Array, "batch heads token rotated_dim"]:
        """Rotate queries or keys by their positions (tokens); shape and dtype are those of x."""
        return x

    def temper(
        self,
        weights: Weights,
        query: Float[Array, "batch kv_heads group query query_dim"],
        position: Int[Array, "batch query"],
    ) -> Float[Array, "batch kv_heads group query query_dim"]:
        """Scale queries by a temperature that depends on their position; shape and dtype
        are kept.
        """
        return query

    def bias(self, weights: Weights, logits: Logits, pairs: Pairs) -> Logits:
        """Add the bias of this encoding to the scaled logits; float32."""
        return logits

    def bias_block(
        self,
        weights: Weights,
        logits: Logits,
        pairs: Pairs,
        after: Float[Array, "batch kv_heads group query"],
    ) -> tuple[Logits, Float[Array, "batch kv_heads group query"]]:
        """Compute `bias` of one block of keys, for a core that visits blocks from right to left.

        after: carry from the blocks to the right of this one, zeros for the rightmost block

        Returns the biased logits and the carry for the next block to the left.
        """
        return self.bias(weights, logits, pairs), after
