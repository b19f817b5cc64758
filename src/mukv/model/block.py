"""What a layer has besides attention: the MLP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import jax

from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param
from mukv.core.typing import Residual, Weights

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=True)}


@dataclass(frozen=True)
class Gated:
    """Gated linear unit (Shazeer 2020): down(activation(gate x) * up x)."""

    kind: Literal["gated"] = "gated"
    hidden: int = 128
    activation: Literal["silu", "gelu"] = "silu"

    grows: ClassVar[tuple[str, ...]] = ("hidden",)
    """Fields that go with the width of the model."""

    def __post_init__(self) -> None:
        if self.hidden < 1:
            raise BadInput("hidden", self.hidden, "at least 1")

    def params(self, d_model: int) -> dict[str, Param]:
        up = Param({"embed": d_model, "hidden": self.hidden}, fan_in=("embed",))
        down = Param(
            {"hidden": self.hidden, "embed": d_model}, fan_in=("hidden",), ends_branch=True
        )
        return {"gate": up, "up": up, "down": down}

    def apply(self, weights: Weights, x: Residual) -> Residual:
        gate = ACTIVATIONS[self.activation](project(x, weights["gate"]))
        return project(gate * project(x, weights["up"]), weights["down"])
