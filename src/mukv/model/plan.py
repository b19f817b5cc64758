"""The layer plan: attention, window and source of entries of every layer.

A plan is a sequence of stages; a stage is a pattern of layers and a number of repeats. `reads` is
the index, from 0, of the layer whose entries a layer uses instead of writing its own; a negative
number counts back from the layer itself (-1: the layer before). `indexed_by` names in the same way
the layer whose indexer chooses what a layer reads. Errors name the number of the layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from mukv.attention import AnyAttention, Attention, EntryStore, Latent
from mukv.core.counts import INT32, require_counts
from mukv.core.errors import BadInput
from mukv.model.feedforward import AnyFeedforward
from mukv.position import AnyPosition

MOST_LAYERS = 10_000
"""Maximum number of layers; every layer is resolved separately, and more are a typing error."""


@dataclass(frozen=True)
class Layer:
    """One layer of a pattern.

    attention: attention of this layer; that of the model if None
    position: position encoding that replaces the one of the attention; None to keep that one
    mlp: feed-forward part of this layer; that of the model if None
    window: tokens that a query sees, itself included; None for all
    reads: layer whose entries this layer reads; None to write and read its own
    indexed_by: layer whose indexer chooses the entries that this layer reads, which then has no
        indexer (GLM-5; IndexCache, 2603.12201); both have latent attention and the same window.
        None to choose by its own indexer, if it has one
    """

    attention: AnyAttention | None = None
    position: AnyPosition | None = None
    mlp: AnyFeedforward | None = None
    window: int | None = None
    reads: int | None = None
    indexed_by: int | None = None


@dataclass(frozen=True)
class Stage:
    """A pattern of layers that is repeated. Repeats are scanned if none reads entries of another,
    or by its choice.

    pattern: layers in order
    repeats: number of times the pattern is repeated
    """

    pattern: tuple[Layer, ...] = (Layer(),)
    repeats: int = 1

    def __post_init__(self) -> None:
        if not self.pattern:
            raise BadInput("pattern", [], "at least one layer")
        require_counts(self, "repeats", most=MOST_LAYERS)


@dataclass(frozen=True)
class ResolvedLayer:
    """A layer of the complete plan, with every setting filled in.

    index: number of the layer in the plan
    stage, slot, repeat: number of the stage, place in its pattern, and number of the repeat
    reads: index of the layer whose entries this layer reads, as in the plan; None for its own
    source: index of the layer that writes the entries that this layer reads
    indexed_by: index of the layer whose indexer chooses what this layer reads; None for its own, or
        to read all entries
    most: maximum number of entries that such a choice has; None for no maximum
    lends: whether a later layer reads the entries that this layer reads
    chooses: whether a later layer reads by the choice of this layer
    """

    index: int
    stage: int
    slot: int
    repeat: int
    attention: AnyAttention
    mlp: AnyFeedforward
    window: int | None
    reads: int | None
    source: int
    indexed_by: int | None = None
    most: int | None = None
    lends: bool = False
    chooses: bool = False

    @property
    def writes(self) -> bool:
        """Whether the layer writes its own entries."""
        return self.source == self.index

    @property
    def needs(self) -> tuple[int, ...]:
        """Indices of the layers whose entries, and whose choice of entries, this layer reads."""
        return (self.source,) if self.indexed_by is None else (self.source, self.indexed_by)

    @property
    def softmax(self) -> Attention:
        """The mixer, which must be attention."""
        assert isinstance(self.attention, Attention), self.attention.kind
        return self.attention

    @property
    def bags(self) -> dict[str, EntryStore]:
        """The layer's stores of entries, with its window applied."""
        return {name: bag.within(self.window) for name, bag in self.attention.bags.items()}

    @property
    def whole(self) -> dict[str, EntryStore]:
        """The stores without a window, which grow with the text; cache policies apply to them."""
        return {name: bag for name, bag in self.bags.items() if bag.window is None}


def resolve(
    stages: Sequence[Stage], attention: AnyAttention, mlp: AnyFeedforward
) -> tuple[ResolvedLayer, ...]:
    """Resolve and check all layers, in order. Raises BadInput with the number of the layer."""
    if (total := sum(stage.repeats * len(stage.pattern) for stage in stages)) > MOST_LAYERS:
        raise BadInput("plan", f"{total:,} layers", f"at most {MOST_LAYERS:,}")
    layers: list[ResolvedLayer] = []
    for s, stage in enumerate(stages):
        for repeat in range(stage.repeats):
            for slot, layer in enumerate(stage.pattern):
                chosen = layer.attention or attention
                index = len(layers)
                if layer.position is not None:
                    if not isinstance(chosen, Attention):
                        allowed = (
                            f"null, since {chosen.kind} in layer {index} takes no position encoding"
                        )
                        raise BadInput("plan", f"position {layer.position.kind}", allowed)
                    chosen = _placed(chosen, layer.position, index)
                reads = _target(index, "reads", layer.reads)
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
                chooser = _target(index, "indexed_by", layer.indexed_by)
                if chooser is not None:
                    resolved = _chosen_by(layers[chooser], resolved, layers)
                layers.append(resolved)
    lenders = {layer.source for layer in layers if not layer.writes}
    choosers = {layer.indexed_by for layer in layers}
    return tuple(
        replace(layer, lends=layer.index in lenders, chooses=layer.index in choosers)
        for layer in layers
    )


def _placed(attention: Attention, position: AnyPosition, index: int) -> Attention:
    """Return the attention with another position encoding. Raises BadInput, with the number of the
    layer, if they don't fit each other.
    """
    try:
        return replace(attention, position=position)
    except BadInput as error:
        allowed = f"layer {index} needs {error.allowed}"
        raise BadInput("plan", f"position {position.kind}", allowed) from error


def _target(index: int, key: str, number: int | None) -> int | None:
    """Convert the number at a key of a layer to the index of an earlier layer. Raises BadInput if
    there is none.
    """
    if number is None:
        return None
    target = index + number if number < 0 else number
    if not 0 <= target < index:
        allowed = f"0 to {index - 1}, or -1 to -{index}" if index else "none, since it is the first"
        raise BadInput(
            "plan", f"{key} {number}", f"layer {index} may read only earlier layers: {allowed}"
        )
    return target


def _check(layer: ResolvedLayer, before: Sequence[ResolvedLayer]) -> None:
    """Raise BadInput for an invalid window, or if a layer can't read the entries of its source."""
    if layer.window is not None and not 1 <= layer.window <= INT32:
        allowed = f"layer {layer.index} must see at least 1 token, and at most {INT32:,}"
        raise BadInput("plan", f"window {layer.window}", allowed)
    if layer.window is not None and not layer.bags:
        kind = layer.attention.kind
        allowed = f"null, since {kind} in layer {layer.index} has a state and no entries"
        raise BadInput("plan", f"window {layer.window}", allowed)
    _check_rates(layer)
    if layer.writes:
        return
    source = before[layer.source]
    for each in (source, layer):
        if not each.bags:
            allowed = (
                f"null, since {each.attention.kind} in layer {each.index} has a state, which no "
                "other layer can read or write"
            )
            raise BadInput("plan", f"reads {layer.reads} in layer {layer.index}", allowed)
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


def _chosen_by(
    target: ResolvedLayer, layer: ResolvedLayer, before: Sequence[ResolvedLayer]
) -> ResolvedLayer:
    """Return a layer without an indexer that reads the entries that the target chooses, or that the
    target reads by the choice of another layer. Raises BadInput if their entries don't lie in the
    same places.
    """
    if target.indexed_by is not None:
        target = before[target.indexed_by]
    chooser, attention = target.attention, layer.attention
    if not isinstance(chooser, Latent) or chooser.indexer is None:
        allowed = f"a layer of latent attention with an indexer, not {chooser.describe()}"
    elif not isinstance(attention, Latent):
        allowed = f"null, since {attention.kind} can't read by the choice of another layer"
    elif target.window != layer.window:
        allowed = f"a layer of the same window: {target.window} and {layer.window} differ"
    else:
        own = replace(attention, indexer=None)
        return replace(layer, attention=own, indexed_by=target.index, most=chooser.indexer.top_k)
    raise BadInput("plan", f"indexed_by {target.index} in layer {layer.index}", allowed)


def _check_rates(layer: ResolvedLayer) -> None:
    """Raise BadInput if some token is in no entry that a later query sees: if the window of the
    tokens' own entries is shorter than the part of a compressed entry that is not complete.
    """
    every = max((bag.every for bag in layer.bags.values()), default=1)
    for bag in layer.bags.values():
        if bag.every == 1 and bag.window is not None and bag.window < every - 1:
            allowed = (
                f"at least {every - 1} in layer {layer.index}: {layer.attention.kind} has a "
                f"compressed entry per {every} tokens, and until it is complete its tokens are "
                "seen in the window only"
            )
            if layer.window is None:
                raise BadInput("attention.window", bag.window, allowed)
            raise BadInput("plan", f"a window of {bag.window}", allowed)


def scannable(stage: int, layers: Sequence[ResolvedLayer]) -> bool:
    """Return whether the repeats of a stage can be scanned.

    This requires that no repeat reads entries of another repeat, or by its choice, and that no
    later layer reads entries of the stage, or by its choice.
    """
    here = {layer.index: layer for layer in layers if layer.stage == stage}
    for layer in layers:
        for needed in map(here.get, layer.needs):
            if needed and (layer.stage, layer.repeat) != (stage, needed.repeat):
                return False
    # A slot must need the same layers in every repeat: slots of its own repeat, or layers of an
    # earlier stage.
    by_slot: dict[int, set[tuple[tuple[bool, int], ...]]] = {}
    for layer in here.values():
        needed = tuple((at in here, here[at].slot if at in here else at) for at in layer.needs)
        by_slot.setdefault(layer.slot, set()).add(needed)
    return all(len(needed) == 1 for needed in by_slot.values())
