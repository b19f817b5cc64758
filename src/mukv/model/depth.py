"""Deepen a model: multiply the repeats of every stage by one ratio.

The number of layers of the shallow model becomes the base of the deep model's scaling.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from typing import Any

from mukv.core.errors import BadInput
from mukv.core.params import LAYER
from mukv.model.plan import Stage
from mukv.model.width import AnyLanguageModel
from mukv.scaling.parameterization import sizes


def deepened(model: AnyLanguageModel, layers: int) -> AnyLanguageModel:
    """Return the model with this number of layers, in which each stage is repeated by the same
    ratio more often.

    Raises BadInput where the stages can't make up this number.
    """
    ratio = Fraction(layers, len(model.layers))

    def deepen_part(part: Any) -> Any:
        """Multiply the repeats of the stages of a model or a part."""
        if isinstance(part, tuple):
            return tuple(map(deepen_part, part))
        if isinstance(part, Stage):
            repeats = part.repeats * ratio
            if repeats.denominator != 1:
                allowed = f"{len(model.layers)} layers times a ratio that divides every stage"
                raise BadInput("depths", layers, f"{allowed}: {part.repeats} repeats do not fit")
            return replace(part, repeats=int(repeats))
        if not is_dataclass(part) or isinstance(part, type):
            return part
        values = {field.name: getattr(part, field.name) for field in fields(part)}
        deeper = {name: deepen_part(value) for name, value in values.items()}
        changed = {name: value for name, value in deeper.items() if value != values[name]}
        return replace(part, **changed) if changed else part

    base = {LAYER: len(model.layers)} | (model.scaling.base or sizes(model.params()))
    deep = deepen_part(replace(model, scaling=replace(model.scaling, base=base)))
    if len(deep.layers) != layers:
        raise BadInput("depths", layers, f"{len(deep.layers)}: some layers are in no stage")
    return deep
