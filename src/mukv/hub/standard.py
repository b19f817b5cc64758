"""A model as others know it: the same function with nothing between its weights and the forward
pass. Multipliers of a parameterisation go into the weights, factors of logits into queries and
the last norm. Where all are one, no number changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp

from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.hub.family import Family, whole_scalar
from mukv.hub.settings import same_number
from mukv.model import Decoder
from mukv.scaling.parameterization import Scaling
from mukv.schema.numbers import leaves
from mukv.schema.schema import to_mapping


def standard(model: Decoder, weights: Any, family: Family) -> tuple[Decoder, dict[str, Any]]:
    """An equal model that scales nothing, and its weights by dotted name."""
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
    _multiply(flat, final, ["final_norm.gain", "final_norm.offset"])
    attention = model.layers[0].attention
    if family.query_scale and whole_scalar(attention.scale):
        layers = attention.scale
    else:
        usual = attention.query_dim**-0.5
        layers, ratio = None, (attention.scale or usual) / usual
        ends = ("read.query_norm.gain", "read.query_norm.offset")
        if not getattr(attention, "norm", None):
            ends = ("read.query", "read.query_bias")
        _multiply(flat, ratio, [name for name in flat if name.endswith(ends)])
    stages = tuple(
        replace(
            stage,
            pattern=tuple(
                replace(layer, attention=layer.attention and replace(layer.attention, scale=layers))
                for layer in stage.pattern
            ),
        )
        for stage in model.plan
    )
    return replace(plain, attention=replace(model.attention, scale=layers), plan=stages), flat


def _multiply(flat: dict[str, Any], factor: float, names: Iterable[str]) -> None:
    """What these weights do, times a factor; an offset from one keeps to its one."""
    if abs(factor - 1) < 1e-12:
        return
    for name in names:
        if name in flat:
            wide = flat[name].astype(jnp.float32)
            made = (1 + wide) * factor - 1 if name.endswith("offset") else wide * factor
            flat[name] = made.astype(flat[name].dtype)


def require_same(model: Decoder, again: Decoder) -> None:
    """Raise BadInput with the field that a model lost on its way into a config.json. again: what
    the file says. Whatever families and readers come to be, nothing is lost silently."""
    wanted, found = _meaning(model), _meaning(again)
    for name in [*wanted, *found]:
        one, other = wanted.get(name), found.get(name)
        rounded = isinstance(one, float) and isinstance(other, float) and same_number(one, other)
        if one != other and not rounded:
            raise BadInput(f"model.{name}", one, f"a config.json would say {other!r} of it")


def _meaning(model: Decoder) -> dict[str, Any]:
    """What a model computes, by the names of fields; layers one by one."""
    told: dict[str, Any] = {
        name: to_mapping(getattr(model, name))
        for name in ("vocab_size", "d_model", "norm", "residual", "embedding_scale", "readout")
    }
    told["logit_softcap"] = model.logit_softcap
    for layer in model.layers:
        attention = to_mapping(layer.attention)
        attention["scale"] = layer.attention.scale or layer.attention.query_dim**-0.5
        attention["biases"] = sorted(attention["biases"])
        attention["position"].pop("pairing")
        said = {"attention": attention, "mlp": to_mapping(layer.mlp), "window": layer.window}
        told[f"layer {layer.index}"] = said
    return leaves(told)
