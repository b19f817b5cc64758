"""One pass of tokens through the layers, for training, prefill or a decoding step.

These differ only in `remember`, which returns the bags of entries that the queries of a layer read.
With a cache, each layer is a function under `jax.jit` that equal layers share. A program of many
layers traces it once. Outside of a program each layer runs as one by itself, so that 30 equal
layers take one compilation of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, no_type_check

import jax
from jax.ad_checkpoint import checkpoint_name

from mukv.attention import DIRECT, AnyAttention, Attention, Bag, Carried, Mask, Queries, Written
from mukv.attention.eviction import Fading
from mukv.attention.indexer import EntryChoice
from mukv.core.compute import RESIDUAL, Compute
from mukv.core.norm import RMSNorm
from mukv.core.partition import constrain_stream, enter_block, gather, leave_block
from mukv.core.programs import Subprogram
from mukv.core.tap import capturing, scope, tap
from mukv.core.typing import Array, Bool, Int, Residual
from mukv.model.auxiliary import Auxiliary, together
from mukv.model.block import AnyResidual
from mukv.model.cache_update import LayerMemory
from mukv.model.layer_inputs import Input, Inputs, LayerInputs
from mukv.model.plan import ResolvedLayer

MemoryOrNone = LayerMemory | None
"""Slots and states of one layer; None in training."""


@dataclass(frozen=True)
class Asked:
    """Values of the new tokens in a layer that a cache policy may request.

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


class PassedOn(NamedTuple):
    """What later layers read of one layer.

    bags: bags of entries; None if no later layer reads them
    choice: places of the entries that each query reads; None for all that it sees, or if no later
        layer reads by it
    """

    bags: tuple[Bag, ...] | None = None
    choice: EntryChoice | None = None


Remember = Callable[
    [ResolvedLayer, Any, MemoryOrNone, Written, Asked], tuple[tuple[Bag, ...], MemoryOrNone]
]
"""Function of a layer, its weights for reading, its slots and states, the result of its `write`,
and a function that computes its queries. Returns the bags that the layer reads, and its slots and
states with the new entries."""


def layer_params(
    layer: ResolvedLayer,
    norm: RMSNorm,
    residual: AnyResidual,
    d_model: int,
    inputs: LayerInputs | None = None,
) -> dict[str, Any]:
    """Declare the weights of one layer; a layer that reads another layer's entries has no weights
    for writing."""
    declared = {
        **residual.params("attention", norm, d_model),
        "read": layer.attention.read_params(d_model),
        **residual.params("mlp", norm, d_model),
        "mlp": layer.mlp.params(d_model),
        **residual.layer_params(),
    }
    if inputs is not None:
        declared["inputs"] = inputs.layer_params(d_model, norm)
    if layer.writes:
        declared["write"] = layer.attention.write_params(d_model)
    return declared


def of_layer(given: Inputs | None, index: int) -> Input | None:
    """Return the input of one of the layers; None if layers have none."""
    return None if given is None else given[:, :, index]


def by_repeat(given: Inputs | None, here: Sequence[ResolvedLayer]) -> Array | None:
    """Return the inputs of the layers of a stage with the repeats along a new first axis: [repeat
    batch token slot input_width]; None if layers have none."""
    if given is None:
        return None
    repeats, first = here[-1].repeat + 1, here[0].index
    own = given[:, :, first : first + len(here)]
    return own.reshape(*own.shape[:2], repeats, -1, own.shape[-1]).transpose(2, 0, 1, 3, 4)


# JAX also rebuilds a pytree with things that are no arrays: shapes can't be checked here.
@no_type_check
@partial(
    jax.tree_util.register_dataclass,
    data_fields=["position", "segment", "remember", "memories", "added", "counted"],
    meta_fields=[
        *("layers", "norm", "residual", "d_model", "first"),
        *("compute", "aligned", "single", "inputs", "owned"),
    ],
)
@dataclass(frozen=True)
class Pass:
    """Settings and inputs that all layers of one pass share.

    first: number of the first layer in the whole model
    aligned: whether queries read only entries of the tokens of this pass
    single: whether each query reads by itself, because a bag chooses what it reads
    inputs: what layers do with their inputs; None if they have none
    remember: a pytree in passes with memories
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
    single: bool = False
    inputs: LayerInputs | None = None
    memories: dict[int, LayerMemory] = field(default_factory=dict)
    added: Int[Array, " batch"] | None = None
    owned: bool = False
    """Whether layers that are programs of their own may overwrite the memories."""
    counted: Bool[Array, "batch token"] | None = None
    """Which tokens are not padding; None in passes whose layers report no auxiliary numbers."""

    def all(self, weights: Sequence[Any], x: Residual, given: Inputs | None = None) -> Residual:
        """Apply every layer, each with its own weights. given: inputs of all layers"""
        known: dict[int, PassedOn] = {}
        for layer, own in zip(self.layers, weights, strict=True):
            x, _ = self.layer(layer, own, x, known, of_layer(given, layer.index))
        return x

    def layer(
        self,
        layer: ResolvedLayer,
        weights: Any,
        x: Residual,
        known: dict[int, PassedOn],
        given: Input | None = None,
    ) -> tuple[Residual, Auxiliary]:
        """Apply one layer; return the residual stream and the layer's auxiliary numbers.

        known: what later layers read of each earlier layer, by layer; that of this layer is added
        given: the layer's input, if layers have one
        """
        memory = self.memories.get(layer.index)
        apply: Callable[..., Any] = partial(self.applied, layer)
        if self.added is not None and not capturing():
            # What equal layers have in common; they differ in their numbers and in their arrays.
            source = 0 if layer.writes else -1
            alike = replace(layer, index=0, stage=0, slot=0, repeat=0, reads=None, source=source)
            alike = replace(alike, indexed_by=None, most=None)
            shared = replace(self, layers=(), first=0, memories={})
            apply = partial(_OWNING if self.owned else _KEEPING, alike, shared)
        if self.aligned:
            apply = self.compute.recomputing(apply)
        bags = None if layer.writes else known[layer.source].bags
        choice = None if layer.indexed_by is None else known[layer.indexed_by].choice
        inherited = PassedOn(bags, choice)
        x, known[layer.index], after, auxiliary = apply(weights, x, inherited, memory, given)
        if after is not None:
            self.memories[layer.index] = after
        return x, auxiliary

    def applied(
        self,
        layer: ResolvedLayer,
        weights: Any,
        x: Residual,
        inherited: PassedOn,
        memory: MemoryOrNone,
        given: Input | None,
    ) -> tuple[Residual, PassedOn, MemoryOrNone, Auxiliary]:
        """Apply one layer.

        weights: of the layer. inherited: what it reads of other layers. memory: its own. given: its
        input.

        Returns the residual stream, what later layers read of this one, its memory, and auxiliary
        numbers.
        """
        attention, stored = layer.attention, weights["read"]
        x = checkpoint_name(x, RESIDUAL)
        residual, norm = self.residual, self.norm
        declared = layer_params(layer, norm, residual, self.d_model, self.inputs)
        weights = gather(self.compute.working_copy(declared, weights), declared)
        with scope(f"layer{self.first + layer.index}"):
            normed = self.entered("attention", weights, x)
            parts, direct = inherited.bags or (), None
            if layer.writes:
                carried = None
                if memory is not None and self.added is not None:
                    carried = Carried(memory.states, self.added)
                written = attention.write(weights["write"], normed, self.position, carried)
                written = attention.by_store(written)
                direct = written.get(DIRECT)
                asked = Asked(attention, weights["read"], normed, self.position)
                parts, memory = self.remember(layer, stored, memory, written, asked)
            mask = Mask(self.segment, layer.window, self.aligned, choice=inherited.choice)
            if layer.chooses:
                asked_for = normed, self.position, parts, mask, self.compute
                mask = replace(mask, choice=attention.choose(weights["read"], *asked_for))
            read, own = self._read(attention, weights["read"], normed, parts, mask, direct)
            read = residual.leave(weights, "attention", norm, self.left(read))
            x = tap("attention", self.stream(x + read))
            normed = self.entered("mlp", weights, x)
            mlp, reported = layer.mlp.branch(weights["mlp"], normed, x, self.counted)
            mlp = residual.leave(weights, "mlp", norm, self.left(mlp))
            x = x + mlp
            if self.inputs is not None and given is not None:
                x = x + self.inputs.apply(weights["inputs"], x, given, norm)
            x = tap("mlp", self.stream(residual.finish(weights, x)))
        faded = [part.reported for part in parts if layer.writes and isinstance(part, Fading)]
        lent = PassedOn(parts if layer.lends else None, mask.choice if layer.chooses else None)
        return x, lent, memory, together(own, reported, *faded)

    def entered(self, branch: str, weights: Any, x: Residual) -> Residual:
        """Return the input of a branch, "attention" or "mlp": the residual stream after its norm,
        with all tokens of the device. weights: of the layer."""
        normed = self.residual.enter(weights, branch, self.norm, x)
        return enter_block(normed, self.compute.platform)

    def left(self, x: Residual) -> Residual:
        """Split what a branch adds to the residual stream as that is split between blocks."""
        return leave_block(x, self.compute.platform)

    def stream(self, x: Residual) -> Residual:
        """Constrain the residual stream to its split between blocks."""
        return constrain_stream(x, self.compute.platform)

    def _read(
        self,
        attention: AnyAttention,
        weights: Any,
        x: Residual,
        parts: Any,
        mask: Mask,
        direct: Any,
    ) -> tuple[Residual, Any]:
        """Read the bags with all queries at once, or with each by itself if `single`."""
        if not self.single or direct is not None:
            return attention.read(weights, x, self.position, parts, mask, self.compute, direct)

        def one(x: Array, position: Array, choice: Array | None) -> Array:
            query = x[:, None], position[:, None]
            own = replace(mask, choice=None if choice is None else choice[:, None])
            return attention.read(weights, *query, parts, own, self.compute)[0][:, 0]

        return jax.vmap(one, in_axes=1, out_axes=1)(x, self.position, mask.choice), None


def _layer(layer: ResolvedLayer, run: Pass, *inputs: Any) -> Any:
    """Apply one layer, as `Pass.applied` does."""
    return run.applied(layer, *inputs)


_KEEPING = Subprogram(_layer, static=1)
"""`_layer` as a function that equal layers share."""
_OWNING = Subprogram(_layer, static=1, donated=5)
"""The same, which overwrites the memory that it is given."""
