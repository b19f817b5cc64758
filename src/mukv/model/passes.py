"""One pass of tokens through the layers, for training, prefill or a decoding step.

These differ only in the function `remember`, which returns the bags of entries that the queries of
a layer read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax

from mukv.attention import Bag, Carried, Mask, Queries, Written
from mukv.core.compute import Compute
from mukv.core.mesh import constrain, gather
from mukv.core.norm import RMSNorm
from mukv.core.tap import scope, tap
from mukv.core.typing import Array, Bool, Int, Residual
from mukv.model.auxiliary import Auxiliary, together
from mukv.model.block import AnyResidual
from mukv.model.plan import ResolvedLayer

Remember = Callable[[ResolvedLayer, Written, Callable[[], Queries]], tuple[Bag, ...]]
"""Maps what a layer wrote, and a function that computes its queries, to the bags that it reads."""


def layer_params(
    layer: ResolvedLayer, norm: RMSNorm, residual: AnyResidual, d_model: int
) -> dict[str, Any]:
    """Declare the weights of one layer; one that reads another's entries has none for writing."""
    declared = {
        **residual.params("attention", norm, d_model),
        "read": layer.attention.read_params(d_model),
        **residual.params("mlp", norm, d_model),
        "mlp": layer.mlp.params(d_model),
    }
    if layer.writes:
        declared["write"] = layer.attention.write_params(d_model)
    return declared


@dataclass(frozen=True)
class Pass:
    """Settings and inputs that all layers of one pass share.

    first: number of the first layer in the whole model
    carried: states that layers continue from, by layer; empty in training
    aligned: whether queries read only entries of the tokens of this pass
    """

    layers: tuple[ResolvedLayer, ...]
    norm: RMSNorm
    residual: AnyResidual
    d_model: int
    first: int
    compute: Compute
    position: Int[Array, "batch token"]
    segment: Int[Array, "batch token"] | None
    remember: Remember
    aligned: bool
    carried: Mapping[int, Carried] = field(default_factory=dict)
    counted: Bool[Array, "batch token"] | None = None
    """Which tokens are not padding; None in passes whose layers report no auxiliary numbers."""

    def all(self, weights: Sequence[Any], x: Residual) -> Residual:
        """Apply every layer, each with its own weights."""
        known: dict[int, tuple[Bag, ...]] = {}
        for layer, own in zip(self.layers, weights, strict=True):
            x, _ = self.layer(layer, own, x, known)
        return x

    def layer(
        self, layer: ResolvedLayer, weights: Any, x: Residual, known: dict[int, tuple[Bag, ...]]
    ) -> tuple[Residual, Auxiliary]:
        """Apply one layer; return the residual stream and the layer's auxiliary numbers.

        known: bags that each earlier layer read, by layer; those of this layer are added
        """

        def apply(weights: Any, x: Residual, inherited: Any) -> tuple[Residual, Any, Auxiliary]:
            attention = layer.attention
            residual, norm = self.residual, self.norm
            declared = layer_params(layer, norm, residual, self.d_model)
            weights = gather(self.compute.working_copy(declared, weights), declared)
            with scope(f"layer{self.first + layer.index}"):
                normed = residual.enter(weights, "attention", norm, x)
                parts = inherited
                if layer.writes:
                    carried = self.carried.get(layer.index)
                    written = attention.write(weights["write"], normed, self.position, carried)
                    query = partial(attention.query, weights["read"], normed, self.position)
                    parts = self.remember(layer, attention.by_store(written), query)
                mask = Mask(self.segment, layer.window, self.aligned)
                read, own = attention.read(
                    weights["read"], normed, self.position, parts, mask, self.compute
                )
                read = residual.leave(weights, "attention", norm, read)
                x = tap("attention", constrain(x + read, "batch", None, None))
                normed = residual.enter(weights, "mlp", norm, x)
                mlp, reported = layer.mlp.apply(weights["mlp"], normed, self.counted)
                mlp = residual.leave(weights, "mlp", norm, mlp)
                x = tap("mlp", constrain(x + mlp, "batch", None, None))
            return x, parts, together(own, reported)

        if self.compute.rematerialise and self.aligned:
            apply = jax.checkpoint(apply)
        x, known[layer.index], auxiliary = apply(weights, x, known.get(layer.source))
        return x, auxiliary
