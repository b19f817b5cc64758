"""The layer plan: which layer has which attention, window and memory, as data.

A plan is a sequence of stages, a stage a pattern of layers times repeats. `reads` names the layer
whose entries a layer uses instead of writing its own: an index from 0, or a negative distance
(-1: the layer before). A plan that can't work is refused here, with the layer's number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mukv.attention import AnyAttention, EntryStore
from mukv.core.counts import INT32, require_counts
from mukv.core.errors import BadInput
from mukv.model.feedforward import AnyFeedforward
from mukv.position import AnyPosition

MOST_LAYERS = 10_000
"""A slip of the finger, not a model, is beyond it; every layer is resolved by itself."""


@dataclass(frozen=True)
class Layer:
    """One layer of a pattern; None means: as the model says.

    window: tokens that a query sees, itself included; None for all.
    reads: the layer whose entries it reads; None to write and read its own.
    """

    attention: AnyAttention | None = None
    position: AnyPosition | None = None
    mlp: AnyFeedforward | None = None
    window: int | None = None
    reads: int | None = None


@dataclass(frozen=True)
class Stage:
    """A pattern of layers, repeated. Repeats are scanned where their memory allows."""

    pattern: tuple[Layer, ...] = (Layer(),)
    repeats: int = 1

    def __post_init__(self) -> None:
        if not self.pattern:
            raise BadInput("pattern", [], "at least one layer")
        require_counts(self, "repeats", most=MOST_LAYERS)


@dataclass(frozen=True)
class ResolvedLayer:
    """A layer of the finished plan: nothing left open, `source` is the layer that wrote."""

    index: int
    stage: int
    slot: int
    repeat: int
    attention: AnyAttention
    mlp: AnyFeedforward
    window: int | None
    reads: int | None
    source: int

    @property
    def writes(self) -> bool:
        return self.source == self.index

    @property
    def bags(self) -> dict[str, EntryStore]:
        """Its stores of entries, within its window."""
        return {name: bag.within(self.window) for name, bag in self.attention.bags.items()}

    @property
    def whole(self) -> dict[str, EntryStore]:
        """Those without a window, which grow with the text: what a policy is for."""
        return {name: bag for name, bag in self.bags.items() if bag.window is None}


def resolve(
    stages: Sequence[Stage], attention: AnyAttention, mlp: AnyFeedforward
) -> tuple[ResolvedLayer, ...]:
    """All layers in order, checked. Raises BadInput with the layer's number."""
    if (total := sum(stage.repeats * len(stage.pattern) for stage in stages)) > MOST_LAYERS:
        raise BadInput("plan", f"{total:,} layers", f"at most {MOST_LAYERS:,}")
    layers: list[ResolvedLayer] = []
    for s, stage in enumerate(stages):
        for repeat in range(stage.repeats):
            for slot, layer in enumerate(stage.pattern):
                chosen = layer.attention or attention
                if layer.position is not None:
                    chosen = replace(chosen, position=layer.position)
                index = len(layers)
                reads = _target(index, layer.reads)
                resolved = ResolvedLayer(
                    index=index,
                    stage=s,
                    slot=slot,
                    repeat=repeat,
                    attention=chosen,
                    mlp=layer.mlp or mlp,
                    window=layer.window,
                    reads=reads,
                    source=index if reads is None else layers[reads].source,
                )
                _check(resolved, layers)
                layers.append(resolved)
    return tuple(layers)


def _target(index: int, reads: int | None) -> int | None:
    if reads is None:
        return None
    target = index + reads if reads < 0 else reads
    if not 0 <= target < index:
        allowed = f"0 to {index - 1}, or -1 to -{index}" if index else "nothing: it is the first"
        raise BadInput(
            "plan", f"reads {reads}", f"layer {index} may read only earlier layers: {allowed}"
        )
    return target


def _check(layer: ResolvedLayer, before: Sequence[ResolvedLayer]) -> None:
    if layer.window is not None and not 1 <= layer.window <= INT32:
        allowed = f"layer {layer.index} must see at least 1 token, and at most {INT32:,}"
        raise BadInput("plan", f"window {layer.window}", allowed)
    if layer.writes:
        return
    source = before[layer.source]
    if source.window != layer.window:
        raise BadInput(
            "plan",
            f"window {layer.window}",
            f"layer {layer.index} reads layer {source.index}, whose window is {source.window}: "
            "they must be equal",
        )
    if source.attention.memory() != layer.attention.memory():
        raise BadInput(
            "plan",
            layer.attention.describe(),
            f"layer {layer.index} reads layer {source.index}, which writes other entries: "
            f"{source.attention.describe()}",
        )


def scannable(stage: int, layers: Sequence[ResolvedLayer]) -> bool:
    """Whether each repeat of a stage needs nothing of another, nor any later layer of it."""
    here = {layer.index: layer for layer in layers if layer.stage == stage}
    for layer in layers:
        source = here.get(layer.source)
        if source and (layer.stage, layer.repeat) != (stage, source.repeat):
            return False
    # A slot must read the same thing in every repeat: itself, a neighbour, or one fixed layer.
    by_slot: dict[int, set[tuple[bool, int]]] = {}
    for layer in here.values():
        inside = layer.source in here
        target = here[layer.source].slot if inside else layer.source
        by_slot.setdefault(layer.slot, set()).add((inside, target))
    return all(len(targets) == 1 for targets in by_slot.values())
