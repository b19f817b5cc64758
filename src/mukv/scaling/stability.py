"""Learning-rate exponents from stability constraints (Everett et al. 2024, section 3).

A parameterisation, an optimizer and the alignment of updates with activations decide how features
and logits grow with the width n. The largest stable learning rates are those for which no
activation's change grows with n. They solve a linear programme, set up here for one embedding, one
hidden layer and one readout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mukv.core.errors import BadInput

UpdateFamily = Literal["sgd", "adam", "adafactor"]
SCALED = ("embedding", "hidden", "readout")
"""Roles whose sizes grow with the width."""


@dataclass(frozen=True)
class Alignment:
    """Exponents of n by which the norm of a product exceeds the product of the factors' RMS norms.

    alpha: exponent for the product of an update with an old activation
    omega: exponent for the product of an old weight with the change of an activation
    both: exponent for the product of an update with the change of an activation (u in the paper)

    0.5 means no alignment, 1 means full alignment.
    """

    alpha: float = 1.0
    omega: float = 0.5
    both: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha", "omega", "both"):
            if not 0.5 <= getattr(self, name) <= 1:
                raise BadInput(name, getattr(self, name), "0.5 (no alignment) to 1 (full)")


FULL = Alignment()
NONE = Alignment(0.5, 0.5, 0.5)


ROUTER = (0.0, 0.5)
"""(a, b) of a router under every parameterisation. Its outputs, a fixed number of scores, then have
the same initial size at every width."""


def router_power(family: UpdateFamily, alignment: Alignment) -> float:
    """Return the exponent of n in a router's learning rate with which changes of its scores have
    the same size at every width. Gradients of the scores are assumed not to shrink with n."""
    # Adafactor's updates are as large as the weight, n ** -b.
    own = ROUTER[1] if family == "adafactor" else 0.0
    return own - max(alignment.alpha, alignment.both)


def check_start(exponents: Mapping[str, tuple[float, float]]) -> None:
    """Raise BadInput unless initial activations are of constant size in n, and logits no larger."""
    if sorted(exponents) != sorted(SCALED):
        raise BadInput("exponents", dict(exponents), f"needs (a, b) of {', '.join(SCALED)}")
    sums = {role: sum(exponents[role]) for role in SCALED}
    for role, needed in (("embedding", 0.0), ("hidden", 0.5)):
        if sums[role] != needed:
            raise BadInput(f"exponents.{role}", exponents[role], f"a + b must be {needed}")
    if sums["readout"] < 0.5:
        raise BadInput("exponents.readout", exponents["readout"], "a + b must be at least 0.5")


def learning_rate_powers(
    exponents: Mapping[str, tuple[float, float]],
    family: UpdateFamily,
    hidden: Alignment,
    readout: Alignment,
) -> dict[str, float]:
    """Compute the largest stable exponent of n in each role's learning rate.

    exponents: (a, b) of embedding, hidden and readout; multipliers are n ** -a, deviations n ** -b
    hidden, readout: alignment in hidden layers and in the readout

    Raises BadInput where initial activations depend on n.
    """
    check_start(exponents)
    # Imported here because scipy loads slowly and most runs look their exponents up.
    from scipy.optimize import linprog

    (a_e, _), (a_h, b_h), (a_o, b_o) = (exponents[role] for role in SCALED)
    # Variables: c of the three roles (learning rates are n ** -c), r of embedding and hidden
    # (changes of their activations are n ** -r), and g (gradients are n ** -g times n ** -a).
    rows, bounds = [], []

    def at_least(bound: float, **terms: int) -> None:
        names = ("c_e", "c_h", "c_o", "r_e", "r_h", "g")
        rows.append([-terms.get(name, 0) for name in names])
        bounds.append(-bound)

    # Size of an update besides c: Adam's is that of the learning rate, SGD's that of the gradient,
    # Adafactor's that of the weight.
    own = {
        "adam": (a_e, a_h, a_o),
        "sgd": (2 * a_e, 2 * a_h, 2 * a_o),
        "adafactor": (0.0, a_h + b_h, a_o + b_o),
    }[family]
    g = {"g": 1} if family == "sgd" else {}
    at_least(-own[0], c_e=1, r_e=-1, **g)
    at_least(hidden.alpha - own[1], c_h=1, r_h=-1, **g)
    at_least(hidden.both - own[1], c_h=1, r_h=-1, r_e=1, **g)
    at_least(hidden.omega - (a_h + b_h), r_e=1, r_h=-1)
    at_least(readout.omega - (a_o + b_o), r_h=1)
    at_least(readout.alpha - own[2], c_o=1)
    at_least(readout.both - own[2], c_o=1, r_h=1)
    at_least(-(a_o + b_o), g=-1)
    at_least(-2 * a_o, c_o=1, g=-1)
    least = 0 if family == "adafactor" else None
    # The small costs of r break ties in favour of changes that do not shrink with n.
    solution = linprog(
        [1, 1, 1, 1e-3, 1e-3, 0],
        rows,
        bounds,
        bounds=[(least, None)] * 3 + [(0, None)] * 2 + [(None, None)],
    )
    assert solution.success, "c may be as large as it takes"
    powers = [0.0 - round(float(c), 9) for c in solution.x[:3]]
    return dict(zip(SCALED, powers, strict=True))
