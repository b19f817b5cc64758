"""One pass through the layers, whatever it is for: training, prefill or a single step.

What differs is only what a layer's `remember` answers, i.e. which bags of entries its queries
read.
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
"""Given what a layer wrote and what it looks for, the bags of entries that its readers see."""


def layer_params(
    layer: ResolvedLayer, norm: RMSNorm, residual: AnyResidual, d_model: int
) -> dict[str, Any]:
    """Weights of one layer; one that reads another's entries has none to write with."""
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
    """One pass through the layers: what all of them share. first: number of the first of them.
    carried: what layers continue from, by their index; in training nothing."""

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
    """Which tokens are no padding, in a pass whose layers report something; None in others."""

    def all(self, weights: Sequence[Any], x: Residual) -> Residual:
        """Through every layer, each with its own weights."""
        known: dict[int, tuple[Bag, ...]] = {}
        for layer, own in zip(self.layers, weights, strict=True):
            x, _ = self.layer(layer, own, x, known)
        return x

    def layer(
        self, layer: ResolvedLayer, weights: Any, x: Residual, known: dict[int, tuple[Bag, ...]]
    ) -> tuple[Residual, Auxiliary]:
        """Through one layer, and what it reports; adds to `known` what it wrote."""

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
