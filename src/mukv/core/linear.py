"""Products with weights, in the precision that their types ask for.

Operands are rounded to the type of the weight, for the product only, forward and backward; sums
are float32 and the result has the type of the activations. Float32 activations with bfloat16
weights are what CPUs with bfloat16 instructions are fast at: the precision class of automatic
mixed precision.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

from mukv.core.low_rank import LowRank
from mukv.core.typing import Array, Float


def project(
    x: Array, weight: Array | LowRank, contracted: int = 1, out: jnp.dtype | None = None
) -> Array:
    """Contract the last `contracted` axes of x with the first ones of the weight.

    out: type of the result; that of x if None.
    """
    if isinstance(weight, LowRank):
        thin = project(x, weight.a, contracted)
        return project(x, weight.base, contracted, out) + project(thin, weight.b, 1, out or x.dtype)
    rows, columns = x.shape[: x.ndim - contracted], weight.shape[contracted:]
    inner = math.prod(weight.shape[:contracted])
    flat: Array = _product(
        x.reshape(-1, inner), weight.reshape(inner, -1), jnp.dtype(out or x.dtype)
    )
    return flat.reshape(*rows, *columns)


def project_each(
    x: Float[Array, "block rows inner"], weight: Float[Array, "block inner columns"] | LowRank
) -> Float[Array, "block rows columns"]:
    """The same for blocks of rows, each with a weight of its own."""
    if isinstance(weight, LowRank):
        thin = project_each(x, weight.a)
        return project_each(x, weight.base) + project_each(thin, weight.b)
    return _product(x, weight, x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(
    x: Float[Array, "*block rows inner"],
    weight: Float[Array, "*block inner columns"],
    out: jnp.dtype,
) -> Float[Array, "*block rows columns"]:
    return jnp.matmul(x.astype(weight.dtype), weight, preferred_element_type=out)


def _forward(x: Array, weight: Array, out: jnp.dtype) -> tuple[Array, tuple[Array, Array, Array]]:
    narrow = x.astype(weight.dtype)
    return _product(x, weight, out), (narrow, weight, jnp.empty(0, x.dtype))


def _backward(
    out: jnp.dtype, saved: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, weight, like = saved
    narrow = gradient.astype(x.dtype)
    # In float32 the product reads a transposed weight as fast where it lies.
    turned = _turned(weight) if weight.dtype == jnp.bfloat16 else weight.swapaxes(-1, -2)
    to_x = jnp.matmul(narrow, turned, preferred_element_type=like.dtype)
    to_weight = jnp.matmul(_turned(x), narrow, preferred_element_type=jnp.float32)
    return to_x, to_weight.astype(weight.dtype)


_product.defvjp(_forward, _backward)


def _turned(x: Float[Array, "*batch rows columns"]) -> Float[Array, "*batch columns rows"]:
    """The transposed matrices. A CPU multiplies row by row: they have to lie in memory as they
    are read, or the product takes up to five times as long."""

    def laid_out(transposed: Array) -> Array:
        return with_layout_constraint(transposed, Layout(tuple(range(x.ndim))))

    transposed = jnp.swapaxes(x, -1, -2)
    # Decided when the program is lowered, for the platform that it is lowered for.
    return jax.lax.platform_dependent(transposed, cpu=laid_out, default=lambda same: same)


@jax.custom_vjp
def similarity(
    x: Float[Array, "*batch rows width"], y: Float[Array, "*batch columns width"]
) -> Float[Array, "*batch rows columns"]:
    """x . y of all pairs of rows; operands in the type that they have, float32 sums.

    Here and below only thin matrices are turned, never what has a number for each pair.
    """
    if x.shape[-2] < y.shape[-1]:
        # A few rows against many, as in decoding: turning the many would be most of the work.
        # The many come first: XLA's product on a CPU is slow with few rows on its left.
        product = jnp.einsum("...yd,...xd->...yx", y, x, preferred_element_type=jnp.float32)
        return jnp.swapaxes(product, -1, -2)
    return _sums(x, _turned(y))


def _similarity_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, y = saved
    narrow = gradient.astype(x.dtype)
    to_y = jnp.swapaxes(_sums(_turned(x), narrow), -1, -2)
    return _sums(narrow, y).astype(x.dtype), to_y.astype(y.dtype)


similarity.defvjp(lambda x, y: (similarity(x, y), (x, y)), _similarity_backward)


@jax.custom_vjp
def mixture(
    weights: Float[Array, "*batch rows columns"], y: Float[Array, "*batch columns width"]
) -> Float[Array, "*batch rows width"]:
    """Sums of the rows of y by weights, which are rounded to its type; float32 sums."""
    return _sums(weights.astype(y.dtype), y)


def _mixture_forward(weights: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    narrow = weights.astype(y.dtype)
    return _sums(narrow, y), (narrow, y)


def _mixture_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    weights, y = saved
    narrow = gradient.astype(y.dtype)
    to_y = jnp.swapaxes(_sums(_turned(narrow), weights), -1, -2)
    return similarity(narrow, y), to_y.astype(y.dtype)


mixture.defvjp(_mixture_forward, _mixture_backward)


def _sums(x: Array, y: Array) -> Array:
    """Products of matrices, one batch axis at most: XLA's fast ones on a CPU know no more."""
    flat = (array.reshape(-1, *array.shape[-2:]) for array in (x, y))
    product = jnp.matmul(*flat, preferred_element_type=jnp.float32)
    return product.reshape(*x.shape[:-1], y.shape[-1])
