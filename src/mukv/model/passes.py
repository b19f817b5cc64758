"""One pass of tokens through the layers, for training, prefill or a decoding step.

The three kinds of passes differ only in the function `remember`, which returns the bags of entries
that the queries of a layer read. With a cache, layers that differ only in their number are traced
once, so that tracing and lowering take about as long for 30 layers as for one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from mukv.attention import DIRECT, AnyAttention, Attention, Bag, Carried, Mask, Queries, Written
from mukv.core.compute import RESIDUAL, Compute
from mukv.core.mesh import constrain, gather
from mukv.core.norm import RMSNorm
from mukv.core.tap import capturing, scope, tap
from mukv.core.typing import Array, Bool, Int, Residual
from mukv.model.auxiliary import Auxiliary, together
from mukv.model.block import AnyResidual
from mukv.model.cache_update import LayerMemory
from mukv.model.plan import ResolvedLayer

Memory = LayerMemory | None
"""Slots and states of one layer; None in training."""


@dataclass(frozen=True)
class Asked:
    """What a cache policy may ask of a layer about the new tokens.

    x: the layer's input after the norm
    """

    attention: AnyAttention
    weights: Any
    x: Residual
    position: Int[Array, "batch token"]

    def __call__(self) -> Queries:
        """Compute the queries; only attention has one."""
        assert isinstance(self.attention, Attention)
        return self.attention.query(self.weights, self.x, self.position)


Remember = Callable[[ResolvedLayer, Any, Memory, Written, Asked], tuple[tuple[Bag, ...], Memory]]
"""Function of a layer, its weights for reading, its slots and states, the result of its `write`,
and a function that computes its queries. Returns the bags that the layer reads, and its slots and
states with the new entries."""


def layer_params(
    layer: ResolvedLayer, norm: RMSNorm, residual: AnyResidual, d_model: int
) -> dict[str, Any]:
    """Declare the weights of one layer; a layer that reads another layer's entries has no weights
    for writing."""
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
    aligned: whether queries read only entries of the tokens of this pass
    memories: slots and states by layer, which the pass replaces; empty in training
    added: number of new tokens of each row; None without memories
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
        index, memory = layer.index, self.memories.get(layer.index)
        apply = self._traced_once(layer) if memory is not None else self._applied(layer)
        if self.aligned:
            apply = self.compute.recomputing(apply)
        x, bags, after, auxiliary = apply(weights, x, known.get(layer.source), memory)
        if bags is not None:
            known[index] = bags
        if after is not None:
            self.memories[index] = after
        return x, auxiliary

    def _traced_once(self, layer: ResolvedLayer) -> Callable[..., Any]:
        """Return `_applied` as a jitted function that all equal layers share.

        It is not jitted if another layer reads this layer's entries, because not every bag is a
        pytree, nor while taps capture values.
        """
        if capturing() or layer.index in self._read_by_others:
            return self._applied(layer)
        alike = replace(layer, index=0, stage=0, slot=0, repeat=0, source=0)
        if alike not in self._jitted:

            def apply(*inputs: Any) -> Any:
                x, _, after, auxiliary = self._applied(layer)(*inputs)
                return x, None, after, auxiliary

            self._jitted[alike] = jax.jit(apply)
        return self._jitted[alike]

    @cached_property
    def _jitted(self) -> dict[ResolvedLayer, Callable[..., Any]]:
        return {}

    @cached_property
    def _read_by_others(self) -> set[int]:
        return {layer.source for layer in self.layers if not layer.writes}

    def _applied(self, layer: ResolvedLayer) -> Callable[..., Any]:
        """Return the function that applies one layer.

        Its arguments are the weights, the residual stream, the bags of the layer whose entries this
        one reads, and the slots and states. It returns the residual stream, the bags that it read,
        the new slots and states, and the auxiliary numbers.
        """

        def apply(
            weights: Any, x: Residual, inherited: Any, memory: Memory
        ) -> tuple[Residual, Any, Memory, Auxiliary]:
            attention, stored = layer.attention, weights["read"]
            x = checkpoint_name(x, RESIDUAL)
            residual, norm = self.residual, self.norm
            declared = layer_params(layer, norm, residual, self.d_model)
            weights = gather(self.compute.working_copy(declared, weights), declared)
            with scope(f"layer{self.first + layer.index}"):
                normed = residual.enter(weights, "attention", norm, x)
                parts, direct = inherited, None
                if layer.writes:
                    carried = None
                    if memory is not None and self.added is not None:
                        carried = Carried(memory.states, self.added)
                    written = attention.write(weights["write"], normed, self.position, carried)
                    written = attention.by_store(written)
                    direct = written.get(DIRECT)
                    asked = Asked(attention, weights["read"], normed, self.position)
                    parts, memory = self.remember(layer, stored, memory, written, asked)
                mask = Mask(self.segment, layer.window, self.aligned)
                read, own = attention.read(
                    weights["read"], normed, self.position, parts, mask, self.compute, direct
                )
                read = residual.leave(weights, "attention", norm, read)
                x = tap("attention", constrain(x + read, "batch", None, None))
                normed = residual.enter(weights, "mlp", norm, x)
                mlp, reported = layer.mlp.apply(weights["mlp"], normed, self.counted)
                mlp = residual.leave(weights, "mlp", norm, mlp)
                x = tap("mlp", constrain(x + mlp, "batch", None, None))
            return x, parts, memory, together(own, reported)

        return apply
