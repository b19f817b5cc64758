"""Matrix products whose operands are rounded to the type of the weight.

Operands are rounded for the product only, in the forward and the backward pass; sums are float32
and the result has the type of the activations. Float32 activations with bfloat16 weights, as in
automatic mixed precision, are the fast combination on CPUs with bfloat16 instructions.
"""

from __future__ import annotations

import math
from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.layout import Layout, with_layout_constraint

from mukv.core.broadcast import with_rank
from mukv.core.compact import Compact
from mukv.core.compute import PRODUCT
from mukv.core.low_rank import LowRank
from mukv.core.partition import partitioned_mesh
from mukv.core.typing import Array, Float, Int, Weights


def project(
    x: Array, weight: Array | LowRank | Compact, contracted: int = 1, out: jnp.dtype | None = None
) -> Array:
    """Contract the last `contracted` axes of x with the first `contracted` axes of the weight.

    x: [*rows *contracted]
    weight: [*contracted *columns]
    out: type of the result; that of x if None

    Returns [*rows *columns].
    """
    if isinstance(weight, LowRank):
        thin = project(x, weight.a, contracted)
        return project(x, weight.base, contracted, out) + project(thin, weight.b, 1, out or x.dtype)
    rows, columns = x.shape[: x.ndim - contracted], weight.shape[contracted:]
    inner = math.prod(weight.shape[:contracted])
    if isinstance(weight, Compact):
        found = weight.product(x.reshape(-1, inner)).astype(out or x.dtype)
        return found.reshape(*rows, *columns)
    matrix, kind = weight.reshape(inner, -1), jnp.dtype(out or x.dtype)
    made: Array
    if partitioned_mesh() is None:
        made = _product(x.reshape(-1, inner), matrix, kind, False)
    else:
        # A mesh may split several axes of rows, which could not be merged without a gather.
        made = _product(x.reshape(*rows, inner), matrix, kind, True)
    return checkpoint_name(made, PRODUCT).reshape(*rows, *columns)


def project_each(
    x: Float[Array, "block rows inner"],
    weight: Float[Array, "block inner columns"] | LowRank | Compact,
) -> Float[Array, "block rows columns"]:
    """Multiply each block of rows with its own weight; types are those of `project`."""
    if isinstance(weight, LowRank):
        thin = project_each(x, weight.a)
        return project_each(x, weight.base) + project_each(thin, weight.b)
    if isinstance(weight, Compact):
        weight = weight.whole()
    return checkpoint_name(_product(x, weight, x.dtype, False), PRODUCT)


def project_groups(
    x: Float[Array, "batch token groups inner"],
    weight: Float[Array, "groups ... columns"] | LowRank | Compact,
) -> Float[Array, "batch token groups columns"]:
    """Multiply each group with its own matrix; operands in the weight's type, a float32 result.

    weight: [groups *inner columns]
    """
    if isinstance(weight, LowRank | Compact):
        weight = weight.whole()
    weight = weight.reshape(len(weight), -1, weight.shape[-1])
    x, out = x.astype(weight.dtype), jnp.float32

    def whole(x: Array, weight: Array) -> Array:
        return jnp.einsum("btgi,gic->btgc", x, weight, preferred_element_type=out)

    def by_group(x: Array, weight: Array) -> Array:
        rows = jnp.moveaxis(x, 2, 0).reshape(len(weight), -1, x.shape[3])
        made = jnp.matmul(rows, weight, preferred_element_type=out)
        return jnp.moveaxis(made.reshape(len(weight), *x.shape[:2], -1), 0, 2)

    # For one product of all groups, XLA copies the weight in transposed order on a CPU, which takes
    # most of the time of a decoding step.
    return jax.lax.platform_dependent(x, weight, cpu=by_group, default=whole)


def with_bias(x: Array, weights: Weights, name: str) -> Array:
    """Add the bias with this name, over the last axes of x, if there is one."""
    return x + with_rank(weights[name].astype(x.dtype), x.ndim) if name in weights else x


def look_up(table: Array | Compact, index: Int[Array, "..."]) -> Float[Array, "... width"]:
    """Return rows of an embedding."""
    if isinstance(table, Compact):
        return table.rows(index)
    return jnp.take(table, index, axis=0)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(
    x: Float[Array, "*block rows inner"],
    weight: Float[Array, "*block inner columns"],
    out: jnp.dtype,
    apart: bool,
) -> Float[Array, "*block rows columns"]:
    """Multiply matrices with operands in the weight's type and a result of type `out`.

    apart: whether all axes of x but the last are rows of one product, whose gradients don't merge
        them either; the weight is one matrix then
    """
    return jnp.matmul(x.astype(weight.dtype), weight, preferred_element_type=out)


def _forward(
    x: Array, weight: Array, out: jnp.dtype, apart: bool
) -> tuple[Array, tuple[Array, Array, Array]]:
    rounded = x.astype(weight.dtype)
    return _product(x, weight, out, apart), (rounded, weight, jnp.empty(0, x.dtype))


def _backward(
    out: jnp.dtype, apart: bool, saved: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, weight, like = saved
    rounded = gradient.astype(x.dtype)
    if apart:
        rows = [*range(x.ndim - 1)]
        to_x = _contracted(rounded, weight, [x.ndim - 1], [1], like.dtype)
        to_weight = _contracted(x, rounded, rows, rows, jnp.dtype("float32"))
    else:
        # A float32 product is as fast on a weight that is only marked as transposed.
        marked = weight.dtype != jnp.bfloat16
        transposed = weight.swapaxes(-1, -2) if marked else _transposed(weight)
        to_x = jnp.matmul(rounded, transposed, preferred_element_type=like.dtype)
        to_weight = jnp.matmul(_transposed(x), rounded, preferred_element_type=jnp.float32)
    return to_x, to_weight.astype(weight.dtype)


_product.defvjp(_forward, _backward)


def _contracted(x: Array, y: Array, over_x: list[int], over_y: list[int], out: jnp.dtype) -> Array:
    """Contract these axes of x and of y, with a result of type `out`."""
    axes = (over_x, over_y), ((), ())
    return jax.lax.dot_general(x, y, axes, preferred_element_type=out)


def _transposed(x: Float[Array, "*batch rows columns"]) -> Float[Array, "*batch columns rows"]:
    """Transpose the last two axes; on a CPU, also copy to row-major memory order.

    XLA's CPU product takes up to five times as long on an operand that is only marked as
    transposed.
    """

    def row_major(transposed: Array) -> Array:
        return with_layout_constraint(transposed, Layout(tuple(range(x.ndim))))

    transposed = jnp.swapaxes(x, -1, -2)
    # Chosen when the program is lowered, by the platform that it is lowered for.
    return jax.lax.platform_dependent(transposed, cpu=row_major, default=lambda same: same)


@jax.custom_vjp
def similarity(
    x: Float[Array, "*batch rows width"], y: Float[Array, "*batch columns width"]
) -> Float[Array, "*batch rows columns"]:
    """Compute the dot product of each row of x with each row of y.

    Operands keep their types; the sums and the result are float32. The backward pass is defined
    here so that only tensors as wide as x are copied in transposed order, never a tensor with one
    number per pair of rows.
    """
    if x.shape[-2] < y.shape[-1]:
        # Few rows of x, as in decoding: transposing y would take most of the time. y is the left
        # operand because XLA's CPU product is slow when its left operand has few rows.
        product = jnp.einsum("...yd,...xd->...yx", y, x, preferred_element_type=jnp.float32)
        return jnp.swapaxes(product, -1, -2)
    return matmul(x, _transposed(y))


def _similarity_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, y = saved
    rounded = gradient.astype(x.dtype)
    to_y = jnp.swapaxes(matmul(_transposed(x), rounded), -1, -2)
    return matmul(rounded, y).astype(x.dtype), to_y.astype(y.dtype)


similarity.defvjp(lambda x, y: (similarity(x, y), (x, y)), _similarity_backward)


@jax.custom_vjp
def mixture(
    weights: Float[Array, "*batch rows columns"], y: Float[Array, "*batch columns width"]
) -> Float[Array, "*batch rows width"]:
    """Compute weighted sums of the rows of y: weights @ y.

    The weights are rounded to the type of y; the sums and the result are float32.
    """
    return matmul(weights.astype(y.dtype), y)


def _mixture_forward(weights: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
    rounded = weights.astype(y.dtype)
    return matmul(rounded, y), (rounded, y)


def _mixture_backward(saved: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    weights, y = saved
    rounded = gradient.astype(y.dtype)
    to_y = jnp.swapaxes(matmul(_transposed(rounded), weights), -1, -2)
    return similarity(rounded, y), to_y.astype(y.dtype)


mixture.defvjp(_mixture_forward, _mixture_backward)


def matmul(x: Array, y: Array, precision: jax.lax.Precision | None = None) -> Array:
    """Multiply matrices with float32 sums.

    On a CPU all batch axes are flattened into one, because XLA's fast products there support at
    most one. Elsewhere they stay separate, so that the mesh can split both the batch and the heads.
    """

    multiply = partial(jnp.matmul, precision=precision, preferred_element_type=jnp.float32)

    def flat(x: Array, y: Array) -> Array:
        matrices = (array.reshape(-1, *array.shape[-2:]) for array in (x, y))
        product = multiply(*matrices)
        return product.reshape(*x.shape[:-1], y.shape[-1])

    return jax.lax.platform_dependent(x, y, cpu=flat, default=multiply)
