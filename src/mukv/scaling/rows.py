"""The table of parameterisations: exponents of each row, and its largest stable learning rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from mukv.core.errors import BadInput
from mukv.core.table import Names
from mukv.scaling.stability import SCALED, UpdateFamily, check_start

EXPONENTS = Names[tuple[tuple[float, float], ...]](
    {
        "sp": ((0.0, 0.0), (0.0, 0.5), (0.0, 0.5)),
        "ntk": ((0.0, 0.0), (0.5, 0.0), (0.5, 0.0)),
        "mup": ((-0.5, 0.5), (0.0, 0.5), (0.5, 0.5)),
        "mean_field": ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0)),
    }
)
"""(a, b) of embedding, hidden and readout: multiplier n ** -a, initial deviation n ** -b."""

LEARNING_RATES: Mapping[tuple[UpdateFamily, str], Mapping[str, tuple[float, float, float]]] = {
    ("sgd", "full"): {
        "sp": (0.5, -0.5, -1.0),
        "ntk": (0.5, 0.5, 0.0),
        "mup": (0.0, 0.0, 0.0),
        "mean_field": (1.0, 1.0, 1.0),
    },
    ("sgd", "none"): {
        "sp": (0.5, 0.0, -0.5),
        "ntk": (0.5, 1.0, 0.5),
        "mup": (0.0, 0.5, 0.0),
        "mean_field": (1.0, 1.5, 1.0),
    },
    ("adam", "full"): {
        "sp": (0.0, -1.0, -1.0),
        "ntk": (0.0, -0.5, -0.5),
        "mup": (-0.5, -1.0, -0.5),
        "mean_field": (0.0, -0.5, 0.0),
    },
    ("adam", "none"): {
        "sp": (0.0, -0.5, -0.5),
        "ntk": (0.0, 0.0, 0.0),
        "mup": (-0.5, -0.5, 0.0),
        "mean_field": (0.0, 0.0, 0.5),
    },
    ("adafactor", "full"): {
        "sp": (0.0, -0.5, -0.5),
        "ntk": (0.0, -0.5, -0.5),
        "mup": (0.0, -0.5, 0.0),
        "mean_field": (0.0, -0.5, 0.0),
    },
    ("adafactor", "none"): {
        "sp": (0.0, 0.0, 0.0),
        "ntk": (0.0, 0.0, 0.0),
        "mup": (0.0, 0.0, 0.0),
        "mean_field": (0.0, 0.0, 0.0),
    },
}
"""Exponents of n in the largest stable learning rates of embedding, hidden and readout, by
optimizer family and alignment. `stability.py` derives each of them.
"""


@dataclass(frozen=True)
class Parameterization:
    """A row of the table from outside of the package; its learning rates are derived.

    embedding, hidden, readout: (a, b): multiplier n ** -a, initial deviation n ** -b
    """

    embedding: tuple[float, float]
    hidden: tuple[float, float]
    readout: tuple[float, float]

    def __post_init__(self) -> None:
        check_start(dict(zip(SCALED, self.row, strict=True)))

    @property
    def row(self) -> tuple[tuple[float, float], ...]:
        """(a, b) of embedding, hidden and readout."""
        return self.embedding, self.hidden, self.readout


def add_row(part: Parameterization, name: str) -> None:
    """Add a row to the table. Raises BadInput for a name in use."""
    if name == "custom" or EXPONENTS.get(name, part.row) != part.row:
        raise BadInput("register Parameterization: name", name, "another name: this one is in use")
    EXPONENTS[name] = part.row
