"""The same model, wider: every size that goes with d_model by one ratio.

Heads become more, not larger, and groups of query heads keep their size; a single KV head that
all share stays single. The narrow model's sizes become the base of the wide one's scaling.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

from mukv.core.errors import BadInput
from mukv.model.decoder import Decoder
from mukv.model.plan import Layer, Stage
from mukv.scaling.parameterization import sizes


def widened(model: Decoder, d_model: int) -> Decoder:
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
        """An attention or MLP."""
        if part is None:
            return None
        grown = {
            field: times(field, size)
            for field in part.grows
            if (size := getattr(part, field)) is not None
            and not (field == "kv_heads" and size == 1)
        }
        return replace(part, **grown)

    def layer(given: Layer) -> Layer:
        return replace(given, attention=wider(given.attention), mlp=wider(given.mlp))

    plan = tuple(Stage(tuple(map(layer, stage.pattern)), stage.repeats) for stage in model.plan)
    base = model.scaling.base or sizes(model.params())
    return replace(
        model,
        d_model=d_model,
        attention=wider(model.attention),
        mlp=wider(model.mlp),
        plan=plan,
        scaling=replace(model.scaling, base=base),
    )
