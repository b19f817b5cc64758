"""Products with gradients of our own are the products, and exist in every shape and precision."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.linear import mixture, project, similarity
from tests.processes import environment


def draw(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).standard_normal(shape), jnp.float32)


PRODUCTS = {
    "similarity": (similarity, "bgxd,bgyd->bgxy", (2, 3, 9, 4), (2, 3, 7, 4)),
    "similarity of few": (similarity, "bgxd,bgyd->bgxy", (2, 3, 1, 4), (2, 3, 7, 4)),
    "mixture": (mixture, "bgxy,bgyd->bgxd", (2, 3, 9, 7), (2, 3, 7, 4)),
    "project": (project, "bte,ehd->bthd", (2, 9, 6), (6, 3, 4)),
    "project two": (lambda x, w: project(x, w, 2), "bthd,hde->bte", (2, 9, 3, 4), (3, 4, 6)),
}


@pytest.mark.product
@pytest.mark.parametrize("name", PRODUCTS)
def test_values_and_gradients(name):
    ours, formula, *shapes = PRODUCTS[name]
    arguments = tuple(draw(*shape) for shape in shapes)

    def total(product):
        return lambda *given: jnp.sum(jnp.sin(product(*given)))

    one = jax.value_and_grad(total(ours), (0, 1))(*arguments)
    two = jax.value_and_grad(total(lambda *a: jnp.einsum(formula, *a)), (0, 1))(*arguments)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), one, two)


BFLOAT16 = """
import itertools, jax, jax.numpy as jnp
from mukv.core.linear import mixture, similarity
for batch, rows, columns, width in itertools.product((1, 2), (1, 16, 64), (1, 5, 64), (2, 64)):
    x = jnp.ones((batch, 2, rows, width), jnp.bfloat16)
    y = jnp.ones((batch, 2, columns, width), jnp.bfloat16)
    both = lambda x, y: jnp.sum(mixture(similarity(x, y), y))
    value, _ = jax.jit(jax.value_and_grad(both, (0, 1)))(x, y)
    assert value == batch * 2 * rows * columns * width * width, (batch, rows, columns, width)
"""


@pytest.mark.product
def test_every_shape_in_bfloat16():
    """Products in bfloat16 agree, in a process with XLA's optimisations, without which XLA has no
    such products."""
    done = subprocess.run(
        [sys.executable, "-c", BFLOAT16], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
