"""Convert a model to an equivalent model without scaling factors, which other programs can run.

Multipliers of a parameterisation are merged into the weights, and factors of logits into the
queries and the last norm. If all factors are one, no number changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from mukv.attention import Attention, GatedDelta, Latent
from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.hub.family import Family
from mukv.hub.settings import same_number
from mukv.model import Decoder
from mukv.scaling.parameterization import Scaling
from mukv.schema.numbers import leaves
from mukv.schema.schema import to_mapping


def standard(model: Decoder, weights: Any, family: Family) -> tuple[Decoder, dict[str, Any]]:
    """Return an equivalent model without scaling, and its weights by dotted name."""
    flat = named(model.scaled(weights))
    plain = replace(model, scaling=Scaling())
    width = (model.scaling.base or {}).get("embed", model.d_model)
    final = 1.0
    if model.embedding_scale and width != model.d_model:
        ratio = (width / model.d_model) ** 0.5
        flat["embedding"] = flat["embedding"] * ratio
        final = 1 / ratio if model.readout == "tied" else 1.0
    if model.readout == "tied":
        final *= model.scaling.tied_factor(model.params()["embedding"])
    _multiply(flat, final, ["final_norm.gain", "final_norm.offset", "final_norm.bias"])
    resolved = {(layer.stage, layer.slot): layer.attention for layer in model.layers}
    for (stage, slot), attention in resolved.items():
        if isinstance(attention, Attention):
            _fold_scale(flat, f"stage{stage}.slot{slot}.", attention, family)
            scale = family.written_scale(attention)
            resolved[stage, slot] = replace(attention, scale=scale)
    stages = tuple(
        replace(
            stage,
            pattern=tuple(
                replace(layer, attention=resolved[number, slot])
                for slot, layer in enumerate(stage.pattern)
            ),
        )
        for number, stage in enumerate(model.plan)
    )
    return replace(plain, plan=stages), flat


def _fold_scale(flat: dict[str, Any], place: str, attention: Attention, family: Family) -> None:
    """Multiply the queries of the layers at a place of the plan by the ratio of the scale of their
    logits to that of the exported model.
    """
    usual = attention.query_dim**-0.5
    ratio = (attention.scale or usual) / (family.written_scale(attention) or usual)
    ends = ("read.query_norm.gain", "read.query_norm.offset")
    if not any(place + end in flat for end in ends):
        ends = ("read.query", "read.query_bias")
    _multiply(flat, ratio, [place + end for end in ends])


def _multiply(flat: dict[str, Any], factor: float, names: Iterable[str]) -> None:
    """Multiply weights by a factor. Of gains that are stored as offsets from one, 1 + offset is
    multiplied.
    """
    if abs(factor - 1) < 1e-12:
        return
    for name in names:
        if name in flat:
            wide = flat[name].astype(jnp.float32)
            made = (1 + wide) * factor - 1 if name.endswith("offset") else wide * factor
            flat[name] = made.astype(flat[name].dtype)


def require_same(model: Decoder, again: Decoder) -> None:
    """Raise BadInput, with the field, if writing a model to a config.json changes it.

    again: the model that is read from the file

    The comparison does not depend on the family, so that no field is lost silently.
    """
    wanted, written = _meaning(model), _meaning(again)
    for name in [*wanted, *written]:
        one, other = wanted.get(name), written.get(name)
        rounded = isinstance(one, float) and isinstance(other, float) and same_number(one, other)
        if one != other and not rounded:
            raise BadInput(f"model.{name}", one, f"a config.json would contain {other!r}")


def _meaning(model: Decoder) -> dict[str, Any]:
    """Return all settings that determine the function of a model, by name of the field, with each
    layer separate.
    """
    meaning: dict[str, Any] = {
        name: to_mapping(getattr(model, name))
        for name in ("vocab_size", "d_model", "norm", "residual", "embedding_scale", "readout")
    }
    meaning |= {"logit_softcap": model.logit_softcap, "positions": model.positions}
    meaning["layer_inputs"] = model.layer_inputs and to_mapping(model.layer_inputs)
    for layer in model.layers:
        attention = to_mapping(layer.attention)
        if isinstance(layer.attention, Attention):
            attention["scale"] = layer.softmax.scale or layer.softmax.query_dim**-0.5
            attention["position"].pop("pairing", None)
            if "biases" in attention:
                attention["biases"] = sorted(attention["biases"])
            if isinstance(layer.attention, Latent):
                attention["head_value_dim"] = layer.attention.value_dim
        elif isinstance(layer.attention, GatedDelta):
            attention["key_heads"] = layer.attention.query_heads
            attention["head_value_dim"] = layer.attention.value_dim
        mlp = to_mapping(layer.mlp)
        for part in (mlp, mlp.get("experts")):
            if isinstance(part, dict):
                for name in ("balance", "z_loss"):  # of the training objective
                    part.pop(name, None)
                if part.get("groups") == 1:
                    part.pop("group_best")
        own = {"attention": attention, "mlp": mlp, "window": layer.window, "reads": layer.source}
        meaning[f"layer {layer.index}"] = own
    return leaves(meaning)
