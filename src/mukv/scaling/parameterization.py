"""How initialisation, forward multiplier and learning rate of a weight follow from its sizes.

A parameterisation is a row of a table, by the role of a weight (abc-parameterisations, Everett et
al. 2024, section 3): its deviation is fan_in ** -b, its forward multiplier fan_in ** -a and its
learning rate the base rate times fan_in ** -c. Today the table has one row, the standard
parameterisation with one global rate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from mukv.core.params import Param, Role, map_params


@dataclass(frozen=True)
class Exponents:
    """multiplier a, deviation b, learning rate c."""

    multiplier: float = 0.0
    deviation: float = 0.0
    learning_rate: float = 0.0


PARAMETERIZATIONS: Mapping[str, Mapping[Role, Exponents]] = {
    "sp": {
        "embedding": Exponents(deviation=0.5),
        "hidden": Exponents(deviation=0.5),
        "readout": Exponents(deviation=0.5),
        "vector": Exponents(),
    },
}


@dataclass(frozen=True)
class Resolved:
    """What a weight is given: deviation of its initial values, factor of its values in the
    forward pass, factor of the learning rate, and whether it decays."""

    deviation: float
    multiplier: float
    learning_rate: float
    decays: bool


@dataclass(frozen=True)
class Scaling:
    """kind: the row of the table."""

    kind: Literal["sp"] = "sp"

    def resolve(self, param: Param) -> Resolved:
        """The numbers of one weight. An embedding that is only looked up has fan-in 1."""
        exponents = PARAMETERIZATIONS[self.kind][param.role]
        fan_in = param.fan_in_size
        return Resolved(
            deviation=fan_in**-exponents.deviation,
            multiplier=fan_in**-exponents.multiplier,
            learning_rate=fan_in**-exponents.learning_rate,
            decays=param.role != "vector",
        )

    def resolve_all(self, declared: Any) -> Any:
        return map_params(self.resolve, declared)

    def scale(self, declared: Any, weights: Any) -> Any:
        """The weights as the forward pass sees them."""
        return map_params(
            lambda param, weight: (
                weight if (factor := self.resolve(param).multiplier) == 1 else weight * factor
            ),
            declared,
            weights,
        )
