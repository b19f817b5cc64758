"""The same model, wider: every size that goes with d_model by one ratio.

Heads become more, not larger, and groups of query heads keep their size; a single KV head that
all share stays single. The narrow model's sizes become the base of the wide one's scaling.
"""

from __future__ import annotations

import math
from dataclasses import fields, is_dataclass, replace
from fractions import Fraction
from typing import Any, TypeVar

from mukv.core.errors import BadInput
from mukv.model.base import LanguageModel
from mukv.scaling.parameterization import sizes

Model = TypeVar("Model", bound=LanguageModel)


def widened(model: Model, d_model: int) -> Model:
    """Raises BadInput where a size would be no whole number."""
    ratio = Fraction(d_model, model.d_model)

    def times(field: str, size: int) -> int:
        wide = size * ratio
        if wide.denominator != 1:
            raise BadInput(
                "widths",
                d_model,
                f"{field} would be {float(wide):g}: needs a multiple of "
                f"{model.d_model // math.gcd(model.d_model, size)}",
            )
        return int(wide)

    def wider(part: Any) -> Any:
        """A model or a part of one: what it names in `grows`, and what is inside."""
        if isinstance(part, tuple):
            return tuple(map(wider, part))
        if not is_dataclass(part) or isinstance(part, type):
            return part
        grows = getattr(part, "grows", ())
        changes: dict[str, Any] = {}
        for field in fields(part):
            value = getattr(part, field.name)
            if field.name not in grows:
                changes[field.name] = wider(value)
            elif value is not None and not (field.name == "kv_heads" and value == 1):
                changes[field.name] = times(field.name, value)
        return replace(part, **changes)

    base = model.scaling.base or sizes(model.params())
    return wider(replace(model, scaling=replace(model.scaling, base=base)))
