"""Parameterisations: initial deviation, multiplier and learning rate of a weight from its width.

A parameterisation is a row of a table (abc-parameterisations, Everett et al. 2024, table 1). For
each role of a weight it has the exponents of multiplier, initial standard deviation and learning
rate in the ratio of the weight's width to a base width. The base is given in the configuration; at
exactly the base sizes all parameterisations are the same model. Depth follows CompleteP (Dey et al.
2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Annotated, Any, Literal

import jax

from mukv.core.errors import BadInput, unknown_name
from mukv.core.params import LAYER, Param, Role, map_params, named
from mukv.core.table import imported
from mukv.core.typing import Array, Number
from mukv.scaling.rows import EXPONENTS, LEARNING_RATES, Parameterization, add_row
from mukv.scaling.stability import (
    FULL,
    NONE,
    ROUTER,
    SCALED,
    Alignment,
    UpdateFamily,
    check_start,
    learning_rate_powers,
    router_power,
)


@dataclass(frozen=True)
class Constants:
    """Factors per role of a weight, the same at every width.

    embedding: factor of the embedding
    hidden: factor of the matrices inside layers
    readout: factor of the matrix that makes logits
    router: factor of the weights that score experts
    vector: factor of gains and biases
    """

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
    """Measured alignment exponents, in place of "full" or "none".

    hidden: exponents of the matrices inside layers
    readout: exponents of the matrix that makes logits
    """

    hidden: Alignment = field(default_factory=Alignment)
    readout: Alignment = field(default_factory=Alignment)


@dataclass(frozen=True)
class Resolved:
    """Hyperparameters of one weight.

    deviation: standard deviation of its initial values
    multiplier: factor of its values in the forward pass
    learning_rate: factor of the learning rate
    epsilon: factor of Adam's epsilon
    decays: whether weight decay applies
    depth_multiplier, depth_rate: the factors of `multiplier` and `learning_rate` that depend on the
        number of layers, which optimizers with a width rule of their own keep
    """

    deviation: Number
    multiplier: Number
    learning_rate: Number
    epsilon: Number
    decays: bool
    depth_multiplier: float = 1.0
    depth_rate: float = 1.0


@dataclass(frozen=True)
class Scaling:
    """How hyperparameters change with a model's sizes.

    kind: parameterisation: standard (sp), neural tangent kernel (ntk), maximal update (mup) or mean
        field (mean_field); "custom" takes the one of `exponents`, and a dotted path that of a
        `mukv.Parameterization`
    base: size of each dimension in the model that the hyperparameters were tuned for; None means
        the model's own sizes
    alignment: assumed alignment of updates with activations, from which the learning rates follow;
        "ignored" gives all weights one learning rate at every width
    exponents: (a, b) of each role, for kind "custom"; None otherwise
    depth: CompleteP's alpha, 0.5 to 1; None means no change with depth
    rate: factor of the learning rate of each role
    multiplier: factor of the values of each role in the forward pass
    deviation: factor of the initial standard deviation of each role
    zeros: weights that are initialised to zero
    """

    kind: Annotated[str, EXPONENTS] = "sp"
    base: dict[str, int] | None = None
    alignment: Literal["full", "none", "ignored"] | Measured = "full"
    exponents: dict[str, tuple[float, float]] | None = None
    depth: float | None = None
    rate: Constants = field(default_factory=Constants)
    multiplier: Constants = field(default_factory=Constants)
    deviation: Constants = field(default_factory=Constants)
    zeros: tuple[Literal["query", "readout"], ...] = ()

    def __post_init__(self) -> None:
        if self.kind != "custom" and self.kind not in EXPONENTS:
            if "." not in self.kind:
                raise unknown_name("kind", self.kind, (*EXPONENTS, "custom"))
            part = imported(self.kind, "kind")
            if not isinstance(part, Parameterization):
                raise BadInput("kind", self.kind, "the path of a mukv.Parameterization")
            add_row(part, self.kind)
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
        # Dicts have no hash; equal objects are equal in these fields.
        return hash((self.kind, self.alignment, self.depth, self.zeros))

    def check(self, declared: Any) -> None:
        """Raise BadInput unless `base` names exactly the dimensions that the weights depend on."""
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

    def at_width(self, prefix: str) -> Scaling:
        """Return the parameterisation of a part of a model whose declarations lack the prefix that
        the names of its dimensions have in the model (`Param.prefixed`)."""
        if self.base is None:
            return self
        base = {n.removeprefix(prefix): s for n, s in self.base.items() if n.startswith(prefix)}
        return replace(self, base=base)

    # Hyperparameters of a weight

    def resolve(self, declared: Any, layers: int, family: UpdateFamily = "adam") -> Any:
        """Compute the `Resolved` of each declared weight, as a tree of the same structure.

        layers: number of layers of the whole model
        family: optimizer family, which decides the exponents of learning rates
        """
        depth_ratio = layers / (self.base or {}).get(LAYER, layers)
        powers = self._learning_rates(family)
        resolved = [
            self._resolve(param, depth_ratio, powers, param.tag in self.zeros)
            for param in named(declared).values()
        ]
        structure = jax.tree.structure(declared, is_leaf=lambda leaf: isinstance(leaf, Param))
        return structure.unflatten(resolved)

    def scale(self, declared: Any, weights: Any, layers: int) -> Any:
        """Return the weights times their multipliers, as the forward pass uses them."""
        return map_params(
            lambda _, resolved, weight: (
                weight * resolved.multiplier if changes(resolved.multiplier) else weight
            ),
            declared,
            self.resolve(declared, layers),
            weights,
        )

    def logit_factor(self, query: Param) -> float:
        """Return the factor of the attention logits.

        Under full alignment the product of a query and a key grows like head_dim, not like its
        root. query: the weight whose last axis is the width of a query.
        """
        *_, (axis, size) = query.dims.items()
        return (size / (self.base or {}).get(axis, size)) ** -self._excess

    def tied_factor(self, embedding: Param) -> float:
        """Return the factor of the output logits where the embedding is also the readout.

        One weight can't have the learning rates of both roles. It has that of an embedding, and
        this factor compensates for the difference.
        """
        return self._ratio(embedding) ** (-0.5 - self._excess)

    @property
    def _excess(self) -> float:
        """Exponent by which a product over n terms grows beyond the root of n."""
        if isinstance(self.alignment, Measured):
            return self.alignment.readout.alpha - 0.5
        return 0.5 if self.alignment == "full" else 0.0

    def _resolve(
        self, param: Param, depth_ratio: float, powers: Mapping[str, float], zero: bool
    ) -> Resolved:
        role: Role = param.role
        ratio = self._ratio(param)
        a, b = ROUTER if role == "router" else self._exponents.get(role, (0.0, 0.0))
        branch = depth_ratio**-self.depth if self.depth is not None and param.ends_branch else 1.0
        inside = self.depth is not None and LAYER in param.dims
        rate_factor = depth_ratio ** (self.depth - 1) if inside and self.depth is not None else 1.0
        epsilon_factor = depth_ratio**-self.depth if inside and self.depth is not None else 1.0
        base_width = math.prod(size for _, size in self._widths(param, of_base=True))
        # An embedding is looked up and not summed over, so its rows have the scale of the residual
        # stream. A vector that declares a fan-in is a filter per channel, whose number of taps does
        # not grow with the model's width.
        fan_in = param.fan_in_size if role == "vector" else base_width if param.fan_in else 1
        return Resolved(
            deviation=0.0 if zero else self._constant("deviation", role) * fan_in**-0.5 * ratio**-b,
            multiplier=self._constant("multiplier", role) * ratio**-a * branch,
            learning_rate=self._constant("rate", role)
            * ratio ** powers.get(role, 0.0)
            * rate_factor,
            epsilon=self._gradient(param) * epsilon_factor,
            decays=role != "vector",
            depth_multiplier=branch,
            depth_rate=rate_factor,
        )

    @cached_property
    def _exponents(self) -> dict[str, tuple[float, float]]:
        if self.exponents is not None:
            return self.exponents
        return dict(zip(SCALED, EXPONENTS[self.kind], strict=True))

    def _learning_rates(self, family: UpdateFamily) -> dict[str, float]:
        if self.alignment == "ignored":
            return {}
        if isinstance(self.alignment, Measured):
            hidden, readout = self.alignment.hidden, self.alignment.readout
        else:
            hidden = readout = FULL if self.alignment == "full" else NONE
        router = {"router": router_power(family, hidden)}
        if not isinstance(self.alignment, Measured):
            cells = LEARNING_RATES[family, self.alignment].get(self.kind)
            if cells is not None:
                return router | dict(zip(SCALED, cells, strict=True))
        return router | learning_rate_powers(self._exponents, family, hidden, readout)

    def _gradient(self, param: Param) -> float:
        """Return the size of a weight's gradient, divided by that in the base.

        The gradient of a gain or bias is that of the activation, n ** -(a + b) of the readout,
        times the number of places that share it. So it is constant for the gain of a QK norm, which
        a growing number of heads share (Complete(d)P, Mlodozeniec et al. 2025).
        """
        a_out, b_out = self._exponents["readout"]
        if param.role == "vector":
            sizes = [(name, size) for name, size in param.dims.items() if name != LAYER]
            mine = math.prod(size for _, size in sizes)
            base = math.prod((self.base or {}).get(name, size) for name, size in sizes)
            return (mine / base) ** -(a_out + b_out)
        if param.role not in self._exponents:
            return 1.0
        a, _ = self._exponents[param.role]
        power = -a_out if param.role == "readout" else -(a_out + b_out) - a
        return self._ratio(param) ** power

    def _constant(self, field: str, role: Role) -> Number:
        return getattr(getattr(self, field), role)

    def _ratio(self, param: Param) -> float:
        """Return a weight's width divided by its width in the base."""
        mine = math.prod(size for _, size in self._widths(param))
        return mine / math.prod(size for _, size in self._widths(param, of_base=True))

    def _widths(self, param: Param, of_base: bool = False) -> list[tuple[str, int]]:
        base = self.base if of_base and self.base is not None else {}
        return [(name, base.get(name, param.dims[name])) for name in widths(param)]


def changes(factor: Number) -> bool:
    """Whether multiplication by the factor has an effect; a traced factor may."""
    return isinstance(factor, Array) or factor != 1


def widths(param: Param) -> tuple[str, ...]:
    """Return the names of the dimensions whose product is a weight's width n.

    These are the contracted axes, or, for an embedding (whose rows are looked up), the axes of a
    row.
    """
    if param.role == "embedding":
        return tuple(param.dims)[1:]
    return () if param.role == "vector" else param.fan_in


def sizes(declared: Any) -> dict[str, int]:
    """Return the size of every dimension that a parameterisation depends on, which are the keys of
    a base. Raises BadInput if layers differ in the size of a dimension."""
    seen: dict[str, int] = {}
    for param in named(declared).values():
        axes = widths(param)
        if param.tag == "query":
            axes = (*axes, tuple(param.dims)[-1])
        for axis in axes:
            if seen.setdefault(axis, param.dims[axis]) != param.dims[axis]:
                given = f"{axis} {seen[axis]} and {param.dims[axis]}"
                raise BadInput("base", given, "one size per dimension, in all layers")
    return seen
