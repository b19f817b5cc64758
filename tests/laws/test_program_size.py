"""Law 15: the numbers of equations of a training step and of a prefill are independent of
length."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from mukv.core.compute import Compute
from mukv.core.params import abstract
from mukv.model.loss import summed_loss
from tests.laws import matrix
from tests.pairs import cover, params

SHORT, LONG = 2048, 32768
COMPUTE = Compute("float32", "float32", loss_chunk=256)


def equations(jaxpr: Any) -> int:
    """Count the equations of a program and of all programs inside it."""
    inner = [
        value
        for equation in jaxpr.eqns
        for given in equation.params.values()
        for value in (given if isinstance(given, tuple | list) else [given])
        if hasattr(value, "eqns") or hasattr(value, "jaxpr")
    ]
    return len(jaxpr.eqns) + sum(equations(getattr(one, "jaxpr", one)) for one in inner)


def training(model: Any, length: int) -> int:
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    weight = jax.ShapeDtypeStruct((1, length), jnp.float32)

    def step(weights: Any, tokens: Any, weight: Any) -> Any:
        def loss(weights: Any) -> Any:
            given = (tokens, tokens, weight, None, tokens)
            return summed_loss(model, weights, *given, compute=COMPUTE).objective

        return jax.value_and_grad(loss)(weights)

    shapes = abstract(model.params(), jnp.dtype("float32"))
    return equations(jax.make_jaxpr(step)(shapes, tokens, weight).jaxpr)


def prefill(model: Any, length: int, fresh: bool) -> int:
    shapes = abstract(model.params(), jnp.dtype("float32"))
    cache = jax.eval_shape(partial(model.empty_cache, 1, length, 4, jnp.dtype("float32")))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    run = partial(model.prefill, fresh=fresh, compute=COMPUTE)
    weights, count = jax.eval_shape(model.unstack, shapes), jax.ShapeDtypeStruct((1,), jnp.int32)
    return equations(jax.make_jaxpr(run)(weights, cache, tokens, count).jaxpr)


ATTENTIONS = cover(matrix.SAMPLE, lambda row: [("attention", row[0])], size=1)


@pytest.mark.parametrize("combination", params(matrix.SAMPLE, ATTENTIONS[:1], "-".join))
def test_programs_do_not_grow_with_length(combination):
    model = matrix.build(*combination)
    assert training(model, SHORT) == training(model, LONG)
    assert prefill(model, SHORT, fresh=True) == prefill(model, LONG, fresh=True)
    assert prefill(model, SHORT, fresh=False) == prefill(model, LONG, fresh=False)
