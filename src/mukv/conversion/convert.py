"""Convert a whole decoder: its plan, and its weights layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from mukv.attention import Grouped
from mukv.conversion.base import Conversion, ConvertedLayer, SourceLayer, wide
from mukv.conversion.named import parse
from mukv.core.errors import BadInput
from mukv.core.typing import Float
from mukv.model import Decoder, LanguageModel, Layer, Stage
from mukv.model.plan import ResolvedLayer, resolve
from mukv.scaling.parameterization import changes

LENGTH = 2048
"""Maximum number of tokens of a row for which a model is converted, unless another is given."""
Examples = Sequence[Float[np.ndarray, "example embed"]]


def convert(
    model: LanguageModel,
    weights: Mapping[str, Any],
    conversion: Conversion | str,
    examples: Examples | None = None,
    length: int | None = None,
) -> tuple[Decoder, dict[str, Any]]:
    """Return the converted model and its weights; those of attention become float32.

    weights: as training and import store them
    conversion: also by its name, such as "gqa:1"
    examples: rows of what the attention of each layer reads, after the norm, as `examples_of`
        makes them; None for unit vectors of the residual stream, all directions of which then
        count the same
    length: tokens of the rows that the model is meant for; None for its context or LENGTH, if that
        is less

    Raises BadInput, with what is possible, for a model or a layer that can't be converted.
    """
    if isinstance(conversion, str):
        conversion = parse(conversion, "conversion")
    decoder = check(model, conversion)
    parts = decoder.unstack(weights)["layers"]
    length = length or min(decoder.context or LENGTH, LENGTH)
    sources: list[SourceLayer] = []
    for layer, own in zip(_resolved(decoder), parts, strict=True):
        assert isinstance(layer.attention, Grouped)
        before = own.get("attention_norm")
        gain = wide(decoder.norm.gain(before)) if before else np.ones(decoder.d_model)
        seen = np.diag(gain) * len(gain) ** 0.5 if examples is None else examples[layer.index]
        mine = layer.index, layer.attention, layer.window, own["read"], own["write"]
        sources.append(SourceLayer(*mine, np.asarray(seen, np.float32), length))
    made = conversion.converted(sources)
    plan = _plan(decoder, made)
    scaling = replace(decoder.scaling, base=None)
    converted = replace(decoder, attention=made[0].attention, plan=plan, scaling=scaling)
    outer = {name: leaf for name, leaf in weights.items() if not name.startswith("stage")}
    return converted, {**outer, **_stacked(converted, parts, made)}


def check(model: LanguageModel, conversion: Conversion) -> Decoder:
    """Return the model as a decoder. Raises BadInput, with what is possible, where it can't be
    converted.
    """
    if not isinstance(model, Decoder):
        raise BadInput("model.kind", model.kind, "decoder: others can't be converted")
    for layer in model.layers:
        where = f"layer {layer.index}"
        if type(layer.attention) is not Grouped:
            allowed = "grouped: a conversion begins with grouped-query attention"
            raise BadInput(f"{where}: attention.kind", layer.attention.kind, allowed)
        if layer.attention.eviction is not None:
            allowed = "null: learned eviction is trained for the entries of this memory"
            raise BadInput(f"{where}: attention.eviction", "gates", allowed)
        if layer.attention.norm_over != "head":
            allowed = "head: a norm over all heads depends on their number"
            raise BadInput(f"{where}: attention.norm_over", layer.attention.norm_over, allowed)
        if layer.attention.norm_values:
            allowed = "false: a conversion combines values, which have another norm then"
            raise BadInput(f"{where}: attention.norm_values", True, allowed)
        if not layer.writes:
            allowed = "null: a conversion begins with layers that write their own entries"
            raise BadInput(f"{where}: reads", layer.source, allowed)
    multipliers = (each.multiplier for each in jax.tree.leaves(model.resolved()))
    scales = [
        [layer.attention.scale for layer in each if isinstance(layer.attention, Grouped)]
        for each in (model.layers, _resolved(model))
    ]
    tied = model.readout == "tied" and model.scaling.tied_factor(model.params()["embedding"]) != 1
    if any(map(changes, multipliers)) or scales[0] != scales[1] or tied:
        allowed = (
            "a parameterisation without factors at this width: `mukv export` and `mukv import` "
            "merge them into the weights"
        )
        raise BadInput("model.scaling", model.scaling.kind, allowed)
    conversion.check(_resolved(model))
    return model


def _resolved(model: Decoder) -> tuple[ResolvedLayer, ...]:
    """Return the layers of the plan, without factors of the parameterisation."""
    return resolve(model.plan, model.attention, model.mlp)


def _plan(model: Decoder, made: Sequence[ConvertedLayer]) -> tuple[Stage, ...]:
    """Return the shortest pattern whose repeats give the layers, and the remaining layers."""
    layers = [
        Layer(
            attention=None if each.attention == made[0].attention else each.attention,
            mlp=None if layer.mlp == model.mlp else layer.mlp,
            window=layer.window,
            reads=each.reads,
        )
        for layer, each in zip(_resolved(model), made, strict=True)
    ]
    count = len(layers)
    period = next(n for n in range(1, count + 1) if layers[n:] == layers[: count - n])
    stages = [Stage(tuple(layers[:period]), count // period)]
    if rest := count % period:
        stages.append(Stage(tuple(layers[:rest])))
    return tuple(stages)


def _stacked(
    model: Decoder, parts: Sequence[Mapping[str, Any]], made: Sequence[ConvertedLayer]
) -> dict[str, Any]:
    """Stack the weights of all layers by stage and slot. parts: weights before the conversion."""
    tree: dict[str, Any] = {}
    for layer, own, new in zip(model.layers, parts, made, strict=True):
        own = {name: leaf for name, leaf in own.items() if name not in ("read", "write")}
        for name, weights in (("read", new.read), ("write", new.write)):
            if weights is not None:
                own[name] = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), weights)
        stage = tree.setdefault(f"stage{layer.stage}", {})
        stage.setdefault(f"slot{layer.slot}", []).append(own)
    return {
        stage: {
            slot: jax.tree.map(lambda *leaves: np.stack(list(map(np.asarray, leaves))), *repeats)
            for slot, repeats in slots.items()
        }
        for stage, slots in tree.items()
    }
