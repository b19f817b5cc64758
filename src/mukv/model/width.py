"""Widen a model: multiply every size that scales with d_model by one ratio.

The number of heads grows, not their width. The number of query heads per KV head is kept, except
that a single KV head stays single. The sizes of the narrow model become the base of the wide
model's scaling.
"""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from typing import Any, TypeVar

from mukv.core.errors import BadInput
from mukv.core.params import LAYER
from mukv.model.base import LanguageModel
from mukv.scaling.parameterization import sizes

AnyLanguageModel = TypeVar("AnyLanguageModel", bound=LanguageModel)


def widened(model: AnyLanguageModel, d_model: int) -> AnyLanguageModel:
    """Return the model with width d_model, and all sizes in `grows` scaled by the same ratio.

    Raises BadInput if a size would not be an integer.
    """
    ratio = Fraction(d_model, model.d_model)

    def scaled_size(field: str, size: int) -> int:
        scaled = size * ratio
        if scaled.denominator != 1:
            raise BadInput(
                "widths",
                d_model,
                f"{field} would be {float(scaled):g}: needs a multiple of "
                f"{model.d_model // math.gcd(model.d_model, size)}",
            )
        return int(scaled)

    def widen_part(part: Any) -> Any:
        """Scale the fields in `grows` of a model or a part, and those of the parts inside."""
        if isinstance(part, tuple):
            return tuple(map(widen_part, part))
        if not is_dataclass(part) or isinstance(part, type):
            return part
        grows = getattr(part, "grows", ())
        changes: dict[str, Any] = {}
        for field in fields(part):
            value = getattr(part, field.name)
            if field.name not in grows:
                changes[field.name] = widen_part(value)
            elif value is not None and not (field.name == "kv_heads" and value == 1):
                changes[field.name] = scaled_size(field.name, value)
        return replace(part, **changes)

    layers = {LAYER: len(model.layers)} if model.scaling.depth is not None else {}
    base = model.scaling.base or {**sizes(model.params()), **layers}
    return widen_part(replace(model, scaling=replace(model.scaling, base=base)))
