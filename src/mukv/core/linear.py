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

from mukv.core.typing import Array, Float


def project(x: Array, weight: Array, contracted: int = 1, out: jnp.dtype | None = None) -> Array:
    """Contract the last `contracted` axes of x with the first ones of the weight.

    out: type of the result; that of x if None.
    """
    rows, columns = x.shape[: x.ndim - contracted], weight.shape[contracted:]
    inner = math.prod(weight.shape[:contracted])
    flat: Array = _product(
        x.reshape(-1, inner), weight.reshape(inner, -1), jnp.dtype(out or x.dtype)
    )
    return flat.reshape(*rows, *columns)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(
    x: Float[Array, "rows inner"], weight: Float[Array, "inner columns"], out: jnp.dtype
) -> Float[Array, "rows columns"]:
    return jnp.matmul(x.astype(weight.dtype), weight, preferred_element_type=out)


def _forward(x: Array, weight: Array, out: jnp.dtype) -> tuple[Array, tuple[Array, Array, Array]]:
    narrow = x.astype(weight.dtype)
    return _product(x, weight, out), (narrow, weight, jnp.empty(0, x.dtype))


def _backward(
    out: jnp.dtype, saved: tuple[Array, Array, Array], gradient: Array
) -> tuple[Array, Array]:
    x, weight, like = saved
    narrow = gradient.astype(x.dtype)
    to_x = jnp.matmul(narrow, weight.T, preferred_element_type=like.dtype)
    # A CPU multiplies row by row: the transposed operand has to lie in memory as it is read.
    transposed = x.T
    if jax.default_backend() == "cpu":
        transposed = with_layout_constraint(transposed, Layout((0, 1)))
    to_weight = jnp.matmul(transposed, narrow, preferred_element_type=jnp.float32)
    return to_x, to_weight.astype(weight.dtype)


_product.defvjp(_forward, _backward)
