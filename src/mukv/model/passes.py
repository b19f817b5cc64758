"""One pass through the layers, whatever it is for: training, prefill or a single step.

What differs is only what a layer's `remember` answers, i.e. which bags of entries its queries
read. With a cache, layers that are equal but for their number are traced once: a model of 30 layers
is traced and lowered about as fast as one of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import jax

from mukv.attention import Bag, Carried, Mask, Queries, Written
from mukv.core.compute import Compute
from mukv.core.mesh import constrain, gather
from mukv.core.norm import RMSNorm
from mukv.core.tap import capturing, scope, tap
from mukv.core.typing import Array, Bool, Int, Residual
from mukv.model.auxiliary import Auxiliary, together
from mukv.model.block import AnyResidual
from mukv.model.cache_update import LayerMemory
from mukv.model.plan import ResolvedLayer

Memory = LayerMemory | None
"""What a layer remembers of earlier tokens; None in training."""
Remember = Callable[
    [ResolvedLayer, Any, Memory, Written, Callable[[], Queries]], tuple[tuple[Bag, ...], Memory]
]
"""(layer, its weights that read, its memory, what it wrote, its queries) -> the bags of entries
that its readers see, and its memory with what it wrote."""


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
    """One pass through the layers: what all of them share.

    first: number of the first layer. memories: by the index of the layer; each is replaced on the
    way. added: new tokens of each row, with memories only.
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
    memories: dict[int, LayerMemory] = field(default_factory=dict)
    added: Int[Array, " batch"] | None = None
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
        index, memory = layer.index, self.memories.get(layer.index)
        apply = self._traced_once(layer) if memory is not None else self._applied(layer)
        if self.compute.rematerialise and self.aligned:
            apply = jax.checkpoint(apply)
        x, bags, after, auxiliary = apply(weights, x, known.get(layer.source), memory)
        if bags is not None:
            known[index] = bags
        if after is not None:
            self.memories[index] = after
        return x, auxiliary

    def _traced_once(self, layer: ResolvedLayer) -> Callable[..., Any]:
        """`_applied`, as a function that JAX traces once for all layers that are alike.

        Not for a layer whose entries another one reads, because not every bag of entries can leave
        a traced function, and not where values are captured.
        """
        if capturing() or layer.index in self._read_by_others:
            return self._applied(layer)
        alike = replace(layer, index=0, stage=0, slot=0, repeat=0, source=0)
        if alike not in self._known:

            def apply(*inputs: Any) -> Any:
                x, _, after, auxiliary = self._applied(layer)(*inputs)
                return x, None, after, auxiliary

            self._known[alike] = jax.jit(apply)
        return self._known[alike]

    @cached_property
    def _known(self) -> dict[ResolvedLayer, Callable[..., Any]]:
        return {}

    @cached_property
    def _read_by_others(self) -> set[int]:
        return {layer.source for layer in self.layers if not layer.writes}

    def _applied(self, layer: ResolvedLayer) -> Callable[..., Any]:
        def apply(
            weights: Any, x: Residual, inherited: Any, memory: Memory
        ) -> tuple[Residual, Any, Memory, Auxiliary]:
            attention, stored = layer.attention, weights["read"]
            residual, norm = self.residual, self.norm
            declared = layer_params(layer, norm, residual, self.d_model)
            weights = gather(self.compute.working_copy(declared, weights), declared)
            with scope(f"layer{self.first + layer.index}"):
                normed = residual.enter(weights, "attention", norm, x)
                parts = inherited
                if layer.writes:
                    carried = None
                    if memory is not None and self.added is not None:
                        carried = Carried(memory.states, self.added)
                    written = attention.write(weights["write"], normed, self.position, carried)
                    query = partial(attention.query, weights["read"], normed, self.position)
                    written = attention.by_store(written)
                    parts, memory = self.remember(layer, stored, memory, written, query)
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
            return x, parts, memory, together(own, reported)

        return apply
