"""Array types and the names of their axes, used in the whole project.

batch, token      rows and columns of a batch of token ids
query, key        tokens that attend, entries that are attended to
embed             width of the residual stream (d_model)
heads, kv_heads   query heads; groups of heads that share one key and value
head_dim          width of one head
vocab, hidden     vocabulary; inner width of the MLP
layer             leading axis of weights that are stacked over the repeats of a stage
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax import Array
from jaxtyping import Bool, Float, Int, UInt4, UInt8, UInt32

Weights = Mapping[str, Any]
"""A nested mapping from names to arrays; its leaves mirror those of the `Param` tree."""

Tokens = Int[Array, "batch token"]
Residual = Float[Array, "batch token embed"]

Number = float | Array
"""A number of a configuration; an array where many runs are traced in one program."""

__all__ = [
    "Array",
    "Bool",
    "Float",
    "Int",
    "Number",
    "Residual",
    "Tokens",
    "UInt4",
    "UInt8",
    "UInt32",
    "Weights",
]
