"""Functions that are compiled before they are called."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core import programs
from mukv.core.programs import Subprogram, Subprograms
from mukv.core.tap import capture, tap


@pytest.fixture
def made():
    """Two subprograms, the functions of which say when they are traced, and a function of them."""
    traced = []

    def scale(factor, x):
        traced.append(("scale", factor, x.shape))
        return factor * x

    def add(x, y):
        traced.append(("add", x.shape))
        return x + scaled(2, y)

    scaled, total = Subprogram(scale, static=1), Subprogram(add, donated=0)

    def together(x, y, count):
        return total(scaled(3, x), scaled(3, y)), count + 1

    return together, traced, scaled, total


def test_subprograms_are_compiled_once_and_give_what_the_function_gives(made):
    together, traced, scaled, total = made
    x, y, count = jnp.arange(4.0), jnp.ones(4), 5
    subprograms = Subprograms(together)
    begun = subprograms.begin(x, y, count)
    out, more = begun.outputs()
    assert (out.shape, out.dtype, out.sharding) == (x.shape, x.dtype, x.sharding)
    program = begun.result()
    # `scale` by 2 is a part of `add`, and not a program of its own.
    assert (len(scaled.programs), len(total.programs)) == (1, 1)
    seen = list(traced)
    for _ in range(2):
        out, more = program(x, np.ones(4, np.float32), count)
        np.testing.assert_array_equal(out, 3 * x + 6)
        assert more == 6
    assert traced == seen
    assert (len(scaled.programs), len(total.programs)) == (1, 1)


def test_subprograms_take_abstract_arrays(made):
    together, _, scaled, total = made
    x = jnp.arange(4.0)
    like = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    program = Subprograms(together).compiled(like, like, 0)
    before = len(scaled.programs), len(total.programs)
    np.testing.assert_array_equal(program(x, x, 0)[0], 9 * x)
    assert (len(scaled.programs), len(total.programs)) == before == (1, 1)


def test_on_several_devices_subprograms_are_one_program(made):
    together, _, scaled, total = made
    mesh = jax.make_mesh((2,), ("data",))
    split = jax.device_put(jnp.arange(4.0), jax.NamedSharding(mesh, jax.P("data")))
    out, _ = Subprograms(together).compiled(split, split, 0)(split, split, 0)
    np.testing.assert_array_equal(out, 9 * np.arange(4.0))
    assert not scaled.programs
    assert not total.programs


def test_the_oldest_program_is_forgotten(made, monkeypatch):
    scaled = made[2]
    monkeypatch.setattr(programs, "KEPT", 2)
    for length in (1, 2, 3):
        scaled(2, jnp.ones(length))
    assert [signature[0][0] for *_, signature in scaled.programs] == [(2,), (3,)]


def test_a_program_may_overwrite_what_it_is_given(made):
    x, y = jnp.arange(4.0), jnp.ones(4)
    made[3](x, y)
    assert x.is_deleted()
    assert not y.is_deleted()


def test_what_is_captured_leaves_a_subprogram():
    @Subprogram
    def double(x):
        return tap("doubled", 2 * x)

    with capture() as seen:
        double(jnp.ones(2))
    np.testing.assert_array_equal(seen["doubled"], [2, 2])
