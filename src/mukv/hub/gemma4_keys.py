"""Keys of Gemma 4 for windows, sizes of heads, shared entries and feed-forward parts of layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.hub.family import MOST_HEADS
from mukv.hub.feedforward import WRITTEN, FeedforwardKeys, require
from mukv.hub.gemma import EveryNthGlobal
from mukv.hub.layer_keys import LayerWindows
from mukv.hub.rotation import GLOBAL, LOCAL, THETA
from mukv.hub.settings import ACTIVATIONS, Given, same_number
from mukv.model import Decoder
from mukv.model.block import Feedforward, Gated
from mukv.model.experts import MOST_EXPERTS, Experts
from mukv.model.mlp_and_experts import MLPAndExperts
from mukv.model.plan import ResolvedLayer

ROPES: Mapping[str, Mapping[str, Any]] = {
    LOCAL: {"rope_type": "default", THETA: 1e4},
    GLOBAL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, THETA: 1e6},
}
"""The rotations if the file has none."""
PER_LAYER = "per_layer_config"
SIZES = ("num_key_value_heads", "head_dim")
"""Keys that `per_layer_config` may override."""
EQUAL = "attention_k_eq_v"


@dataclass(frozen=True)
class LastGlobal(EveryNthGlobal):
    """As the base class; the last layer never has a window."""

    def read(self, given: Given, layers: int) -> LayerWindows:
        return [*super().read(given, layers)[:-1], None]

    def write(self, windows: LayerWindows) -> dict[str, Any]:
        if windows[-1]:
            raise BadInput("plan: window", windows[-1], "null in the last layer")
        return super().write(windows)


def read_sizes(given: Given, windows: LayerWindows) -> dict[bool, tuple[int, int]]:
    """Return the number of KV heads and the width of a head, in layers with and without a
    window."""
    usual = {key: given.whole(key, high=MOST_HEADS) for key in SIZES}
    layers = range(len(windows))
    own: dict[int, Mapping[str, Any]] = {}
    if PER_LAYER in given.mapping:
        for key in given.inside(PER_LAYER).mapping:
            part = given.inside(PER_LAYER).inside(key)
            if not key.isdecimal() or int(key) not in layers:
                raise BadInput(part.where, key, f"numbers of layers, 0 to {len(windows) - 1}")
            for name in part.mapping:
                if name not in SIZES:
                    raise BadInput(part.where, name, f"not supported; allowed: {', '.join(SIZES)}")
            own[int(key)] = {name: part.whole(name, high=MOST_HEADS) for name in part.mapping}
    else:
        every = {"head_dim": given.whole("global_head_dim", high=MOST_HEADS)}
        heads = given.whole("num_global_key_value_heads", high=MOST_HEADS, null=True)
        if heads is not None and given.flag(EQUAL):
            every["num_key_value_heads"] = heads
        own = {layer: every for layer in layers if not windows[layer]}
    found: dict[bool, set[tuple[int, int]]] = {}
    for layer, window in enumerate(windows):
        kv_heads, head_dim = (own.get(layer, {}).get(key, usual[key]) for key in SIZES)
        found.setdefault(bool(window), set()).add((kv_heads, head_dim))
    for sizes in found.values():
        if len(sizes) > 1:
            raise BadInput(f"{given.where}: {PER_LAYER}", sorted(sizes), "one per type of layer")
    return {local: sizes.pop() for local, sizes in found.items()}


def read_sources(given: Given, windows: LayerWindows) -> list[int | None]:
    """Return the layer whose entries each layer reads; None for its own."""
    shared = given.whole("num_kv_shared_layers", low=0, high=len(windows))
    first = len(windows) - shared
    last = {bool(window): layer for layer, window in enumerate(windows[:first])}
    for window in windows[first:]:
        if bool(window) not in last:
            allowed = f"fewer, so that a layer of type {LOCAL if window else GLOBAL} writes entries"
            raise BadInput(f"{given.where}: num_kv_shared_layers", shared, allowed)
    return [*[None] * first, *(last[bool(window)] for window in windows[first:])]


def sources(layers: Sequence[ResolvedLayer]) -> int:
    """Return the number of last layers that read the entries of another layer. Raises BadInput
    unless each reads those of the last layer of its type that writes."""
    writers = [layer for layer in layers if layer.writes]
    last = {bool(layer.window): layer.index for layer in writers}
    for layer in layers[len(writers) :]:
        if layer.writes or layer.source != last[bool(layer.window)]:
            allowed = "in the last layers only, the last layer before them with the same window"
            raise BadInput("plan: reads", layer.reads, allowed)
    return len(layers) - len(writers)


@dataclass(frozen=True)
class WiderReaders(FeedforwardKeys):
    """A gated MLP in all layers, of twice the width in those that read the entries of another if
    `use_double_wide_mlp` is true, and experts beside it if `enable_moe_block` is true."""

    def read_layers(self, given: Given, sources: Sequence[int | None]) -> list[Feedforward]:
        """Return the feed-forward part of each layer. sources: as `read_sources` returns them"""
        own = wide = self.gated(given)
        if given.flag("use_double_wide_mlp"):
            wide = replace(own, hidden=2 * own.hidden)
        parts = [own if source is None else wide for source in sources]
        if not given.flag("enable_moe_block"):
            return [*parts]
        number = given.whole("num_experts", high=MOST_EXPERTS)
        experts = Experts(
            experts=number,
            # The only weight of a single expert would always be one.
            top_k=given.whole("top_k_experts", low=2, high=number),
            hidden=given.whole("moe_intermediate_size"),
            activation=given.one_of(self.activation, ACTIVATIONS),
            expert_scale=True,
        )
        norm = RMSNorm(given.number("rms_norm_eps"))
        scale = given.whole("hidden_size") ** -0.5
        return [
            MLPAndExperts(mlp=part, experts=experts, norm=norm, router_scale=scale)
            for part in parts
        ]

    def write_layers(self, model: Decoder) -> dict[str, Any]:
        """Return the keys of the feed-forward parts. Raises BadInput for parts that the family
        can't express."""
        inputs = model.layer_inputs
        hidden: dict[bool, set[int]] = {True: set(), False: set()}
        activations = {inputs.activation} if inputs else set()
        beside = {
            replace(layer.mlp, mlp=Gated())
            for layer in model.layers
            if isinstance(layer.mlp, MLPAndExperts)
        }
        for layer in model.layers:
            part = layer.mlp.mlp if beside and isinstance(layer.mlp, MLPAndExperts) else layer.mlp
            if not isinstance(part, Gated) or (beside and part is layer.mlp):
                allowed = "mlp_and_experts in all layers" if beside else "gated or mlp_and_experts"
                raise BadInput("mlp.kind", getattr(part, "kind", "?"), allowed)
            hidden[layer.writes].add(part.hidden)
            activations.add(part.activation)
        width = max(hidden[True])
        if hidden[True] != {width} or not any(hidden[False] <= {n * width} for n in (1, 2)):
            allowed = f"{width} in all layers, or twice that in all that read other entries"
            raise BadInput("plan: mlp.hidden", sorted(set.union(*hidden.values())), allowed)
        keys = {
            "intermediate_size": width,
            "use_double_wide_mlp": hidden[False] == {2 * width},
            "enable_moe_block": bool(beside),
        }
        if len(beside) > 1:
            raise BadInput("plan: mlp", beside, "the same experts in all layers")
        if beside:
            part = beside.pop()
            keys |= keys_of_experts(part, model)
            activations.add(part.experts.activation)
        if len(activations) > 1:
            raise BadInput("mlp.activation", sorted(activations), "one in all parts and inputs")
        return {**keys, self.activation: WRITTEN[activations.pop()]}


def keys_of_experts(part: MLPAndExperts, model: Decoder) -> dict[str, Any]:
    """Return the keys of the experts beside an MLP. Raises BadInput for those that the family can't
    express."""
    plain = {"limit": None, "up_offset": 0.0, "biases": False, "shared": 0}
    require(part.experts, router="softmax", normalise=True, expert_scale=True, **plain)
    if part.norm != RMSNorm(model.norm.epsilon):
        raise BadInput("mlp.norm", part.norm, str(RMSNorm(model.norm.epsilon)))
    if not same_number(part.router_scale, model.d_model**-0.5):
        allowed = f"1 / sqrt(d_model), which is {model.d_model**-0.5!r}"
        raise BadInput("mlp.router_scale", part.router_scale, allowed)
    return {
        "num_experts": part.experts.experts,
        "top_k_experts": part.experts.top_k,
        "moe_intermediate_size": part.experts.hidden,
    }
