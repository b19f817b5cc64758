"""A weight plus the product of two thin matrices, for low-rank adapters (LoRA, Hu et al. 2021).

Training changes the two thin matrices only. Matrix products multiply with the parts, without
forming the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mukv.core.params import Param
from mukv.core.typing import Array, Float

RANK = "adapter_rank"
"""Name of the dimension that the two thin matrices share."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank:
    """The weight base + a b, where the product is over the rank.

    base: [*leading *contracted *others], with any number of leading axes (layers, experts)
    a: [*leading *contracted rank]
    b: [*leading rank *others]

    `core.linear.project` multiplies with the parts, so that neither the sum nor its gradient
    exists. Other JAX functions, such as `einsum`, call `__jax_array__`, which forms the sum.
    """

    base: Float[Array, "..."]
    a: Float[Array, "..."]
    b: Float[Array, "..."]

    @property
    def leading(self) -> int:
        """Number of leading axes."""
        return self.a.ndim + self.b.ndim - 2 - self.base.ndim

    @property
    def dtype(self) -> jnp.dtype:
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.base.shape

    @property
    def ndim(self) -> int:
        return self.base.ndim

    def whole(self) -> Array:
        """Form the sum, in the wider type of base and parts."""
        return self.base + product(self.a, self.b, self.leading)

    __jax_array__ = whole

    def astype(self, dtype: DTypeLike) -> LowRank:
        """Round each part."""
        return LowRank(*(part.astype(dtype) for part in (self.base, self.a, self.b)))

    def __getitem__(self, index: Any) -> LowRank:
        """Index the first of the leading axes."""
        return LowRank(self.base[index], self.a[index], self.b[index])

    def mapped(self, function: Callable[[Param, Array], Array], param: Param) -> LowRank:
        """Apply `function(param, array)` to each part. param: declaration of the weight."""
        a, b = factors(param, self.a.shape[-1])
        parts = ((param, self.base), (a, self.a), (b, self.b))
        return LowRank(*(function(own, part) for own, part in parts))


def product(
    a: Float[Array, "*leading_rows rank"], b: Float[Array, "*leading rank *columns"], leading: int
) -> Float[Array, "*leading *rows *columns"]:
    """Multiply the two thin matrices over the rank, in float32. leading: number of leading axes."""
    first, rows, columns = a.shape[:leading], a.shape[leading:-1], b.shape[leading + 1 :]
    flat = jnp.matmul(
        a.reshape(*first, math.prod(rows), a.shape[-1]),
        b.reshape(*first, b.shape[leading], math.prod(columns)),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return flat.reshape(*first, *rows, *columns)


def rows(param: Param) -> tuple[str, ...]:
    """Return the axes of the first thin matrix besides the rank: the contracted axes, or the axis
    of token ids of an embedding. Empty for gains, biases and other weights without an adapter.
    """
    if param.role == "embedding":
        return tuple(param.dims)[:1]
    own = len(param.own_shape) - len(param.fan_in)
    return param.fan_in if param.role != "vector" and own > 0 else ()


def columns(param: Param) -> tuple[str, ...]:
    """Return the axes of the second thin matrix besides the rank."""
    taken = {*param.leading, *rows(param)}
    return tuple(name for name in param.dims if name not in taken)


def factors(param: Param, rank: int) -> tuple[Param, Param]:
    """Declare the two thin matrices of a weight.

    The first one is contracted over the weight's own input, so that a parameterisation treats it as
    any hidden matrix of this width. The second one is contracted over the rank, which is the same
    at every width. Both keep the axes of layers and experts; the second one ends a residual branch
    if the weight does.
    """

    def sizes(names: tuple[str, ...]) -> dict[str, int]:
        return {name: param.dims[name] for name in names}

    first, width = rows(param), {RANK: rank}
    looked_up = param.role == "embedding"
    a = replace(
        param,
        dims=sizes(param.leading) | sizes(first) | width,
        role="embedding" if looked_up else "hidden",
        fan_in=() if looked_up else first,
        init="normal",
        ends_branch=False,
        tag=None,
    )
    b = replace(
        param,
        dims=sizes(param.leading) | width | sizes(columns(param)),
        role="hidden",
        fan_in=(RANK,),
        init="normal",
        tag=None,
    )
    return a, b


def in_order(param: Param) -> bool:
    """Whether a weight's axes have the order that `LowRank` needs: leading, contracted, others."""
    return tuple(param.dims) == (*param.leading, *rows(param), *columns(param))


def added(param: Param, base: Array, a: Array, b: Array) -> Array:
    """Add the product of two thin matrices to a weight whose axes have any order."""
    names = [*param.leading, *rows(param), *columns(param)]
    change = product(a, b, len(param.leading))
    return base + change.transpose([names.index(name) for name in param.dims])
