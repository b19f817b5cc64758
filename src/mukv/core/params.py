"""Declaration of a weight: its named dimensions, the contracted ones, and its role.

Initialisation, forward multiplier, learning rate, decay, sharding, counting and conversion all
follow from the declaration. A model declares a nested dict of `Param`; its weights are a nested
dict of arrays with the same keys.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mukv.core.errors import BadInput, unknown_name
from mukv.core.typing import Array, Float

Role = Literal["embedding", "hidden", "readout", "router", "vector"]
Tag = Literal["query", "key", "value", "gate", "readout", "eviction"]
Init = Literal["normal", "zeros", "ones", "decay_rates", "decay_steps"]
LAYER = "layer"
WIDEST = 1 << 20
"""Upper bound of the width of a model and of other widths, which catches typing errors."""


def _decay_rates(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw logarithms of numbers that are uniform from 1 to 16."""
    return jnp.log(jax.random.uniform(key, shape, minval=1.0, maxval=16.0))


def _decay_steps(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw numbers whose softplus lies between 0.001 and 0.1, uniform in its logarithm."""
    low, high = math.log(1e-3), math.log(1e-1)
    step = jnp.exp(jax.random.uniform(key, shape, minval=low, maxval=high))
    return step + jnp.log(-jnp.expm1(-step))


DRAWN: Mapping[Init, Callable[[Array, tuple[int, ...]], Array]] = {
    "zeros": lambda key, shape: jnp.zeros(shape, jnp.float32),
    "ones": lambda key, shape: jnp.ones(shape, jnp.float32),
    "decay_rates": _decay_rates,
    "decay_steps": _decay_steps,
}
"""Functions that draw initial values which no parameterisation scales. A state with the last two
decays per token by exp(-exp(rate) softplus(step)), with time constants of about 1 to 1,000 tokens
(Mamba 2, Gated DeltaNet)."""


@dataclass(frozen=True)
class Param:
    """Declaration of one weight.

    dims: size of each axis by name, in order
    role: kind of weight, from which a parameterisation chooses initialisation and learning rate; a
        router maps the width to a fixed number of scores, vectors are gains and biases
    fan_in: names of the axes that a forward pass contracts
    init: distribution of the initial values: normal, with the standard deviation that the
        parameterisation chooses, or one of DRAWN
    ends_branch: whether the output is added to the residual stream
    batch: names of the axes that count separate matrices, such as experts, which are neither
        contracted nor outputs; they come first, or after the axis of a stack's layers
    tag: purpose of the weight; None where nothing depends on it
    active: fraction of the weight that one token is multiplied with; below 1 for experts

    Raises BadInput for an unknown role, init or tag, and for an axis that is not in dims.
    """

    dims: Mapping[str, int]
    role: Role = "hidden"
    fan_in: tuple[str, ...] = ()
    init: Init = "normal"
    ends_branch: bool = False
    batch: tuple[str, ...] = ()
    tag: Tag | None = None
    active: float = 1.0

    def __post_init__(self) -> None:
        for field, known in (("role", Role), ("init", Init), ("tag", Tag)):
            given = getattr(self, field)
            if given not in get_args(known) and not (field == "tag" and given is None):
                raise unknown_name(f"Param.{field}", given, get_args(known))
        if not 0 < self.active <= 1:
            raise BadInput("Param.active", self.active, "above 0 and at most 1")
        for field in ("fan_in", "batch"):
            axes = getattr(self, field)
            for axis in axes:
                if axis not in self.dims:
                    raise unknown_name(f"Param.{field}", axis, self.dims)
            if len(set(axes)) < len(axes):
                raise BadInput(f"Param.{field}", axes, "each axis once")
        if both := set(self.fan_in) & set(self.batch):
            raise BadInput("Param.batch", self.batch, f"{', '.join(both)} is in fan_in already")
        if tuple(self.dims)[: len(self.leading)] != self.leading:
            allowed = f"the first axes of {', '.join(self.dims)}"
            raise BadInput("Param.batch", self.batch, allowed)

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of all axes, in order."""
        return tuple(self.dims.values())

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def fan_in_size(self) -> int:
        """Number of inputs that one output sums over."""
        return math.prod(self.dims[name] for name in self.fan_in)

    @property
    def leading(self) -> tuple[str, ...]:
        """Names of the axes that count separate matrices: the layers of a stack, then `batch`."""
        return tuple(name for name in self.dims if name == LAYER or name in self.batch)

    @property
    def own_shape(self) -> tuple[int, ...]:
        """Shape of one of the separate matrices."""
        return tuple(size for name, size in self.dims.items() if name not in self.leading)

    def stacked(self, repeats: int) -> Param:
        """Return the declaration for `repeats` equal layers, stacked along a new leading axis."""
        return replace(self, dims={LAYER: repeats, **self.dims})

    def prefixed(self, prefix: str) -> Param:
        """Return the declaration with a prefix before the name of each dimension but layers, for a
        second width."""
        dims = {name if name == LAYER else prefix + name: n for name, n in self.dims.items()}
        fan_in, batch = (tuple(prefix + n for n in axes) for axes in (self.fan_in, self.batch))
        return replace(self, dims=dims, fan_in=fan_in, batch=batch)


def as_matrices(param: Param, array: Array) -> Float[Array, "*leading rows columns"]:
    """Reshape a weight to matrices: `fan_in` axes become rows, the others but `leading` columns."""
    return array.transpose(_matrix_order(param)).reshape(
        *(param.dims[name] for name in param.leading), param.fan_in_size, -1
    )


def from_matrices(
    param: Param, matrices: Float[Array, "*leading rows columns"]
) -> Float[Array, "..."]:
    """Invert `as_matrices`: reshape matrices to the weight's own axes."""
    order, shape = _matrix_order(param), param.shape
    permuted = matrices.reshape([shape[axis] for axis in order])
    return permuted.transpose([order.index(axis) for axis in range(len(shape))])


def _matrix_order(param: Param) -> list[int]:
    """Return the axes in the order leading, contracted, others."""

    def rank(axis: int) -> int:
        name = list(param.dims)[axis]
        return 0 if name in param.leading else 1 if name in param.fan_in else 2

    return sorted(range(len(param.dims)), key=rank)


def tagged(declared: Any, tag: Tag) -> Param:
    """Return the only weight with this tag. Raises BadInput unless there is exactly one."""
    found = [name for name, param in named(declared).items() if param.tag == tag]
    if len(found) != 1:
        raise BadInput("Param.tag", found, f"exactly one weight with tag {tag}")
    return named(declared)[found[0]]


def map_params(function: Callable[..., Any], declared: Any, *others: Any) -> Any:
    """Apply `function(param, ...)` to each declared weight; `others` have the same keys."""
    return jax.tree.map(function, declared, *others, is_leaf=lambda leaf: isinstance(leaf, Param))


def named(tree: Any) -> dict[str, Any]:
    """Return the leaves of a nested tree by dotted name, in the tree's order."""
    leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Param))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Return a nested tree of leaves by dotted name; the inverse of `named`."""
    tree: dict[str, Any] = {}
    for name, leaf in leaves.items():
        *path, last = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = leaf
    return tree


def count(declared: Any) -> int:
    """Return the number of trained parameters."""
    return sum(param.size for param in named(declared).values())


def active(declared: Any) -> int:
    """Return the number of parameters that one token uses; of experts, those it is routed to."""
    return round(sum(param.size * param.active for param in named(declared).values()))


def abstract(declared: Any, dtype: DTypeLike = "float32") -> Any:
    """Return the shapes and types of the weights without allocating them."""
    return map_params(lambda param: jax.ShapeDtypeStruct(param.shape, dtype), declared)


def initialise(declared: Any, deviations: Any, key: Array) -> Any:
    """Draw float32 initial weights.

    declared: tree of `Param`
    deviations: tree of the standard deviations, with the same keys
    key: random key

    The random stream of a weight depends on its name only, so that adding a weight leaves the
    others unchanged.
    """
    streams = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in named(declared)}
    structure = jax.tree.structure(declared, is_leaf=lambda leaf: isinstance(leaf, Param))

    def draw(param: Param, deviation: float, stream: Array) -> Array:
        if param.init != "normal":
            return DRAWN[param.init](stream, param.shape)
        return deviation * jax.random.normal(stream, param.shape, jnp.float32)

    return map_params(draw, declared, deviations, structure.unflatten(streams.values()))
