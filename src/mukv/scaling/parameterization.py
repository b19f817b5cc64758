"""How initialisation, forward multiplier and learning rate of a weight follow from its sizes.

A parameterisation is a row of a table (abc-parameterisations, Everett et al. 2024, table 1): for
each role of a weight the powers that multiplier, deviation and learning rate take of the ratio of
its width to a base width. The base is only declared: a model of just its sizes is the same under
all of them. Depth follows CompleteP (Dey et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Literal

import jax

from mukv.core.errors import BadInput
from mukv.core.params import LAYER, Param, Role, map_params, named
from mukv.core.typing import Array, Number
from mukv.scaling.stability import (
    FULL,
    NONE,
    ROUTER,
    SCALED,
    Alignment,
    Family,
    check_start,
    learning_rate_powers,
    router_power,
)

EXPONENTS: Mapping[str, tuple[tuple[float, float], ...]] = {
    "sp": ((0.0, 0.0), (0.0, 0.5), (0.0, 0.5)),
    "ntk": ((0.0, 0.0), (0.5, 0.0), (0.5, 0.0)),
    "mup": ((-0.5, 0.5), (0.0, 0.5), (0.5, 0.5)),
    "mean_field": ((0.0, 0.0), (0.5, 0.0), (1.0, 0.0)),
}
"""(a, b) of embedding, hidden and readout: multiplier n ** -a, deviation n ** -b."""

LEARNING_RATES: Mapping[tuple[Family, str], Mapping[str, tuple[float, float, float]]] = {
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
"""Powers of n that the largest stable learning rates of embedding, hidden and readout take, by
optimizer and alignment. `stability.py` derives each of them."""


@dataclass(frozen=True)
class Constants:
    """A factor for each role of a weight, the same at every width."""

    embedding: float = 1.0
    hidden: float = 1.0
    readout: float = 1.0
    router: float = 1.0
    vector: float = 1.0

    def __post_init__(self) -> None:
        for each in fields(self):
            if getattr(self, each.name) <= 0:
                raise BadInput(each.name, getattr(self, each.name), "greater than 0")


@dataclass(frozen=True)
class Measured:
    """Alignments as they were measured, rather than full or none."""

    hidden: Alignment = field(default_factory=Alignment)
    readout: Alignment = field(default_factory=Alignment)


@dataclass(frozen=True)
class Resolved:
    """What a weight is given: deviation of its initial values; factors of its values in the
    forward pass, of the learning rate and of Adam's epsilon; and whether it decays."""

    deviation: Number
    multiplier: Number
    learning_rate: Number
    epsilon: Number
    decays: bool


@dataclass(frozen=True)
class Scaling:
    """How a model's numbers change with its sizes.

    kind: a row of the table, or custom. base: size that each dimension has in the model whose
    numbers are given; None for the model's own sizes. alignment: what the learning rates assume
    of updates and activations; "ignored" gives all weights one rate at every width. exponents:
    (a, b) of each role, for kind custom. depth: CompleteP's alpha, 0.5 to 1; None to leave depth
    alone. rate, multiplier, deviation: constants by role. zeros: weights that start at zero.
    """

    kind: Literal["sp", "mup", "ntk", "mean_field", "custom"] = "sp"
    base: dict[str, int] | None = None
    alignment: Literal["full", "none", "ignored"] | Measured = "full"
    exponents: dict[str, tuple[float, float]] | None = None
    depth: float | None = None
    rate: Constants = field(default_factory=Constants)
    multiplier: Constants = field(default_factory=Constants)
    deviation: Constants = field(default_factory=Constants)
    zeros: tuple[Literal["query", "readout"], ...] = ()

    def __post_init__(self) -> None:
        if (self.kind == "custom") != (self.exponents is not None):
            raise BadInput(
                "exponents", self.exponents, "(a, b) of each role for kind custom, else null"
            )
        if self.exponents is not None:
            check_start(self.exponents)
        if self.depth is not None and not 0.5 <= self.depth <= 1:
            raise BadInput("depth", self.depth, "0.5 to 1, or null")
        for name, size in (self.base or {}).items():
            if size < 1:
                raise BadInput(f"base.{name}", size, "at least 1")

    def __hash__(self) -> int:
        # Mappings have no hash; what is equal still agrees in these.
        return hash((self.kind, self.alignment, self.depth, self.zeros))

    def check(self, declared: Any) -> None:
        """Raise BadInput unless the base has every dimension that the weights depend on."""
        if self.base is None:
            return
        needed = sizes(declared)
        if self.depth is not None:
            needed[LAYER] = 1
        for name in needed:
            if name not in self.base:
                raise BadInput(
                    "scaling.base", self.base, f"lacks {name}: needs {', '.join(needed)}"
                )
        for name in self.base:
            if name not in needed and name != LAYER:
                raise BadInput(
                    f"scaling.base.{name}", self.base[name], f"needs {', '.join(needed)}"
                )

    # What follows for a weight

    def resolve(self, declared: Any, layers: int, family: Family = "adam") -> Any:
        """For each declared weight its `Resolved`. layers: of the whole model."""
        deep = layers / (self.base or {}).get(LAYER, layers)
        powers = self._learning_rates(family)
        resolved = [
            self._resolve(param, deep, powers, param.tag in self.zeros)
            for param in named(declared).values()
        ]
        structure = jax.tree.structure(declared, is_leaf=lambda leaf: isinstance(leaf, Param))
        return structure.unflatten(resolved)

    def scale(self, declared: Any, weights: Any, layers: int) -> Any:
        """The weights as the forward pass sees them."""
        return map_params(
            lambda _, resolved, weight: (
                weight * resolved.multiplier if changes(resolved.multiplier) else weight
            ),
            declared,
            self.resolve(declared, layers),
            weights,
        )

    def logit_factor(self, query: Param) -> float:
        """Of attention: under full alignment a query and a key agree like 1 / head_dim, not like
        its root. query: the weight whose last axis is the width of a query."""
        *_, (axis, size) = query.dims.items()
        return (size / (self.base or {}).get(axis, size)) ** -self._excess

    def tied_factor(self, embedding: Param) -> float:
        """Of the logits where the embedding is the readout. One weight can't have the learning
        rates of both, so it has the embedding's, and the logits bear the difference."""
        return self._ratio(embedding) ** (-0.5 - self._excess)

    @property
    def _excess(self) -> float:
        """By how much a product grows beyond the root of its width."""
        if isinstance(self.alignment, Measured):
            return self.alignment.readout.alpha - 0.5
        return 0.5 if self.alignment == "full" else 0.0

    def _resolve(
        self, param: Param, deep: float, powers: Mapping[str, float], zero: bool
    ) -> Resolved:
        role: Role = param.role
        ratio = self._ratio(param)
        a, b = ROUTER if role == "router" else self._exponents.get(role, (0.0, 0.0))
        branch = deep**-self.depth if self.depth is not None and param.ends_branch else 1.0
        inside = self.depth is not None and LAYER in param.dims
        slower = deep ** (self.depth - 1) if inside and self.depth is not None else 1.0
        flatter = deep**-self.depth if inside and self.depth is not None else 1.0
        base_width = math.prod(size for _, size in self._widths(param, of_base=True))
        # An embedding that is only looked up sums nothing: its values are those of the stream.
        fan_in = base_width if param.fan_in else 1
        return Resolved(
            deviation=0.0 if zero else self._constant("deviation", role) * fan_in**-0.5 * ratio**-b,
            multiplier=self._constant("multiplier", role) * ratio**-a * branch,
            learning_rate=self._constant("rate", role) * ratio ** powers.get(role, 0.0) * slower,
            epsilon=ratio ** self._gradient(role) * flatter,
            decays=role != "vector",
        )

    @cached_property
    def _exponents(self) -> dict[str, tuple[float, float]]:
        if self.exponents is not None:
            return self.exponents
        return dict(zip(SCALED, EXPONENTS[self.kind], strict=True))

    def _learning_rates(self, family: Family) -> dict[str, float]:
        if self.alignment == "ignored":
            return {}
        if isinstance(self.alignment, Measured):
            hidden, readout = self.alignment.hidden, self.alignment.readout
        else:
            hidden = readout = FULL if self.alignment == "full" else NONE
        router = {"router": router_power(family, hidden)}
        if self.kind != "custom" and not isinstance(self.alignment, Measured):
            cells = LEARNING_RATES[family, self.alignment][self.kind]
            return router | dict(zip(SCALED, cells, strict=True))
        return router | learning_rate_powers(self._exponents, family, hidden, readout)

    def _gradient(self, role: Role) -> float:
        """The power of n that a weight's gradient goes with: what epsilon is added to."""
        if role not in self._exponents:
            return 0.0
        (a, _), (a_out, b_out) = self._exponents[role], self._exponents["readout"]
        return -a_out if role == "readout" else -(a_out + b_out) - a

    def _constant(self, field: str, role: Role) -> Number:
        return getattr(getattr(self, field), role)

    def _ratio(self, param: Param) -> float:
        """Of a weight's width to that of the base."""
        mine = math.prod(size for _, size in self._widths(param))
        return mine / math.prod(size for _, size in self._widths(param, of_base=True))

    def _widths(self, param: Param, of_base: bool = False) -> list[tuple[str, int]]:
        base = self.base if of_base and self.base is not None else {}
        return [(name, base.get(name, param.dims[name])) for name in widths(param)]


def changes(factor: Number) -> bool:
    """Whether multiplying by it does anything; a traced one may."""
    return isinstance(factor, Array) or factor != 1


def widths(param: Param) -> tuple[str, ...]:
    """The dimensions whose product is a weight's width n: what it sums over, or, of an embedding
    (whose rows are looked up), what a row is long."""
    if param.role == "embedding":
        return tuple(param.dims)[1:]
    return () if param.role == "vector" else param.fan_in


def sizes(declared: Any) -> dict[str, int]:
    """Every dimension that a parameterisation looks at: what a base must name. Raises BadInput
    where layers have different ones."""
    found: dict[str, int] = {}
    for param in named(declared).values():
        axes = widths(param)
        if param.tag == "query":
            axes = (*axes, tuple(param.dims)[-1])
        for axis in axes:
            if found.setdefault(axis, param.dims[axis]) != param.dims[axis]:
                given = f"{axis} {found[axis]} and {param.dims[axis]}"
                raise BadInput("base", given, "one size per dimension, in all layers")
    return found
