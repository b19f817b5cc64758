"""Stores of 8-bit floats, and of rotated entries in 4 and 3 bits, equal formulas in numpy."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mukv.cache import Policy
from mukv.cache.fp8 import FP8
from mukv.cache.rotated import Rotated, rotation
from mukv.core.errors import BadInput
from tests.cache.test_quantised import drawn
from tests.laws.matrix import EXACT
from tests.laws.test_policies import One, model_of, positions

STORES = {"fp8": FP8(), "4": Rotated(), "3": Rotated(bits=3), "3 by 16": Rotated(3, 16)}
KINDS = ("normal", "outlier", "tiny", "huge", "zeros", "constant")


def stored(store, x, folds=1):
    there = jnp.ones(x.shape[:3], bool)

    @jax.jit
    def run(x):
        for _ in range(folds):
            x = store.decode(True, store.encode(True, x, there), x.shape[-1])
        return x

    return np.float64(run(jnp.asarray(x)))


@pytest.mark.product
@pytest.mark.parametrize("kind", KINDS)
def test_floats_of_8_bits(kind):
    """A stored number is the nearest float8 (e4m3) after division by a power of two that brings the
    largest number of the token to at most 448; folds change nothing."""
    x = drawn(kind)
    largest = np.abs(np.float64(x)).max(-1, keepdims=True)
    power = 2.0 ** np.ceil(np.log2(np.where(largest > 0, largest, 1) / 448))
    expected = np.float64((x / power).astype(ml_dtypes.float8_e4m3fn)) * power
    np.testing.assert_allclose(stored(FP8(), x), expected, rtol=1e-6, atol=1e-30)
    np.testing.assert_array_equal(stored(FP8(), x, folds=3), stored(FP8(), x))


@pytest.mark.parametrize("width", [64, 48])
def test_a_rotation_keeps_products(width):
    """The rotation is orthogonal, which keeps products of keys and queries; no element of it is
    large, which spreads one large channel over all."""
    turn = np.float64(rotation(width, 0))
    np.testing.assert_allclose(turn @ turn.T, np.eye(width), atol=1e-6)
    assert np.abs(turn).max() < 4 / width**0.5
    assert not np.array_equal(rotation(width, 0), rotation(width, 1))


@pytest.mark.parametrize("name", ["4", "3", "3 by 16"])
@pytest.mark.parametrize("kind", KINDS)
def test_rotated_entries(name, kind):
    """No rotated number has an error above half a step, and 9 folds have the error of one."""
    store, x = STORES[name], drawn(kind)
    turn, levels = np.float64(rotation(x.shape[-1], 0)), 2**store.bits - 1
    group = min(store.group, x.shape[-1])
    turned = np.float64(x) @ turn
    error = np.abs(stored(store, x) @ turn - turned)
    for start in range(0, x.shape[-1], group):
        part = turned[..., start : start + group]
        step = (part.max(-1, keepdims=True) - part.min(-1, keepdims=True)) / levels
        most = 0.52 * step + 1e-5 * np.abs(turned).max()
        assert (error[..., start : start + group] <= most).all()
    often = np.abs(stored(store, x, folds=9) @ turn - turned)
    assert often.max() <= 1.02 * error.max() + 1e-5 * np.abs(turned).max()


def test_errors_fall_with_bits():
    """Mean squared errors fall with the number of bits and with smaller groups."""
    x = drawn("normal")
    found = {name: np.mean((stored(each, x) - x) ** 2) for name, each in STORES.items()}
    assert found["fp8"] < 1e-3
    assert 3 * found["4"] < found["3"] < 0.08
    assert found["4"] < 0.015
    assert found["3 by 16"] < found["3"]


@pytest.mark.parametrize(
    ("name", "number", "factors"),
    [("fp8", 8, 1), ("rotated", 4, 6), ("rotated(bits=3)", 3, 6)],
)
def test_bytes(name, number, factors):
    """Law 4: the bytes of one layer equal a formula of bits per number and bytes of factors."""
    policy = Policy.parse(name)
    cache = model_of("gqa", "rope").empty_cache(1, 40, 4, EXACT.type, policy)
    body = 2 * 2 * 40 * (8 * number // 8 + factors)
    tail = 4 * 2 * 2 * 8 * 4
    assert cache.nbytes() == body + tail + 40 * 4 + 2 * 4


@pytest.mark.product
@pytest.mark.parametrize("name", ["fp8", "rotated(bits=3)"])
def test_entries_that_are_kept(name):
    """Under another policy the same number of entries is kept, with values close to exact ones."""
    one = One()
    for body, exact in zip(one.body(f"knorm+{name}", 12.0), one.body("knorm", 12.0), strict=True):
        same = body.shelf.entries().tensors["value"] - exact.shelf.entries().tensors["value"]
        there = np.asarray(exact.shelf.position) >= 0
        if np.array_equal(body.shelf.position, exact.shelf.position):
            assert np.abs(np.asarray(same))[there].max() < 0.3
        for row, head in np.ndindex(2, 2):
            assert len(positions(body, row, head)) == 12


def test_bad_parameters():
    for text in ("rotated(bits=5)", "rotated(group=0)", "rotated(seed=-1)"):
        with pytest.raises(BadInput):
            Policy.parse(text)
