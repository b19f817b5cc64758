"""A memory is what a token writes and how a query reads it.

Every attention variant is two functions. Training is `read(x, write(x))`; decoding appends what
`write` gives for one token and reads the lot; reuse across layers reads another layer's entries.
What `write` returns is the cache: bytes are computed from it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax
import jax.numpy as jnp

from mukv.attention.entries import Entries
from mukv.attention.mask import Mask
from mukv.core.params import Param, abstract
from mukv.core.typing import Array, Float, Int, Residual, Weights
from mukv.position import AnyPosition, NoPE


@dataclass(frozen=True)
class Attention:
    """The contract; fields are the YAML keys.

    A variant is frozen and knows no weights: it declares them, split into those that write and
    those that read, since a layer that reuses another's entries has none of the first kind.
    """

    position: AnyPosition = dataclasses.field(default_factory=NoPE)

    def write_params(self, d_model: int) -> dict[str, Param]:
        """Weights that turn a token into entries."""
        raise NotImplementedError

    def read_params(self, d_model: int) -> dict[str, Any]:
        """Weights that turn a token into a query, and what it read into the residual stream."""
        raise NotImplementedError

    def write(
        self, weights: Weights, x: Residual, position: Int[Array, "batch token"]
    ) -> dict[str, Float[Array, "batch kv_heads token width"]]:
        """What each token leaves behind; never more than decoding must keep."""
        raise NotImplementedError

    def read(
        self,
        weights: Weights,
        x: Float[Array, "batch query embed"],
        position: Int[Array, "batch query"],
        parts: Sequence[Entries],
        mask: Mask,
        fused: bool = False,
    ) -> Float[Array, "batch query embed"]:
        """What each query makes of the entries that it may see, in one softmax over all parts.

        fused: take the fused core; only where `mask` is aligned and there is one part.
        """
        raise NotImplementedError

    def memory(self) -> Hashable:
        """What must agree between a layer that writes and another that reads its entries."""
        raise NotImplementedError

    def read_flops(self) -> int:
        """Floating-point operations of the forward pass per query and visible entry."""
        raise NotImplementedError

    @property
    def fusable(self) -> bool:
        """Whether the fused core serves: it never shows the logits that a bias needs."""
        return not self.position.biases

    def written(
        self, d_model: int, batch: int, length: int, dtype: jnp.dtype
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of the entries of `length` tokens, from `write` itself."""
        return jax.eval_shape(
            self.write,
            abstract(self.write_params(d_model), dtype),
            jax.ShapeDtypeStruct((batch, length, d_model), dtype),
            jax.ShapeDtypeStruct((batch, length), jnp.dtype("int32")),
        )

    def describe(self) -> str:
        """The fields on one line."""
        shown = [
            f"{field.name} {getattr(self, field.name)}"
            for field in fields(self)
            if field.name not in ("kind", "position") and getattr(self, field.name) is not None
        ]
        return f"{getattr(self, 'kind', type(self).__name__)} ({', '.join(shown)})"
