"""A weight is declared once: its named dimensions, what is contracted, and its role.

Initialisation, forward multiplier, learning rate, decay, sharding, counting and conversion all
follow from the declaration. A model declares a nested dict of `Param`; the weights are a nested
dict of arrays with the same keys.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mukv.core.typing import Array

Role = Literal["embedding", "hidden", "readout", "vector"]
LAYER = "layer"
WIDEST = 1 << 20
"""The width of a model, and of what is like one, is at most this: beyond is a slip of a finger."""


@dataclass(frozen=True)
class Param:
    """One weight.

    dims: name and size of each axis, in order. fan_in: the axes that a forward pass contracts.
    role: what a parameterisation needs to know of it (vectors are gains and biases).
    init: the distribution; its standard deviation is the parameterisation's to choose.
    ends_branch: what it gives is added to the residual stream.
    """

    dims: Mapping[str, int]
    role: Role = "hidden"
    fan_in: tuple[str, ...] = ()
    init: Literal["normal", "zeros", "ones"] = "normal"
    ends_branch: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.dims.values())

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def fan_in_size(self) -> int:
        return math.prod(self.dims[name] for name in self.fan_in)

    def stacked(self, repeats: int) -> Param:
        """The same weight for `repeats` equal layers, along a leading axis."""
        return replace(self, dims={LAYER: repeats, **self.dims})

    def prefixed(self, prefix: str) -> Param:
        """The same weight with the names of its dimensions told apart from another width's."""
        dims = {prefix + name: size for name, size in self.dims.items()}
        return replace(self, dims=dims, fan_in=tuple(prefix + name for name in self.fan_in))


def map_params(function: Callable[..., Any], declared: Any, *others: Any) -> Any:
    """Apply `function(param, ...)` to each declared weight; `others` have the same keys."""
    return jax.tree.map(function, declared, *others, is_leaf=lambda leaf: isinstance(leaf, Param))


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a nested tree by dotted name, in the tree's order."""
    leaves, _ = jax.tree.flatten_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, Param))
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def count(declared: Any) -> int:
    """The number of trained numbers."""
    return sum(param.size for param in named(declared).values())


def abstract(declared: Any, dtype: DTypeLike = "float32") -> Any:
    """Shapes and types of the weights, nothing allocated."""
    return map_params(lambda param: jax.ShapeDtypeStruct(param.shape, dtype), declared)


def initialise(declared: Any, deviations: Any, key: Array) -> Any:
    """Draw float32 weights; `deviations` gives each its standard deviation.

    A weight's random stream depends on its own name only, so adding one leaves the others alone.
    """
    streams = {name: jax.random.fold_in(key, zlib.crc32(name.encode())) for name in named(declared)}
    structure = jax.tree.structure(declared, is_leaf=lambda leaf: isinstance(leaf, Param))

    def draw(param: Param, deviation: float, stream: Array) -> Array:
        if param.init == "zeros":
            return jnp.zeros(param.shape, jnp.float32)
        if param.init == "ones":
            return jnp.ones(param.shape, jnp.float32)
        return deviation * jax.random.normal(stream, param.shape, jnp.float32)

    return map_params(draw, declared, deviations, structure.unflatten(streams.values()))
