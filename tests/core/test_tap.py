"""Taps record intermediate arrays inside of `capture`, and nothing outside of it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from mukv.core.tap import capture, capturing, scope, tap


def test_a_tap_outside_of_a_capture_does_nothing():
    value = jnp.ones(2)
    assert tap("a", value) is value
    assert not capturing()


def test_names_scopes_and_order():
    with capture() as seen:
        tap("a", jnp.ones(1))
        with scope("layer0"), scope("attention"):
            tap("logits", jnp.zeros(1))
        tap("b", jnp.ones(1))
        assert capturing()
    tap("late", jnp.ones(1))
    assert list(seen) == ["a", "layer0.attention.logits", "b"]


def test_the_inner_capture_sees_its_own():
    with capture() as outer, capture() as inner:
        tap("a", jnp.ones(1))
    assert (list(outer), list(inner)) == ([], ["a"])


def test_an_error_ends_capture_and_scope():
    with pytest.raises(RuntimeError), capture(), scope("layer0"):
        raise RuntimeError
    assert not capturing()
    with capture() as seen:
        tap("a", jnp.ones(1))
    assert list(seen) == ["a"]


def test_captured_values_leave_a_compiled_function():
    @jax.jit
    def double(x):
        with capture() as seen:
            return tap("twice", 2 * x) + 1, dict(seen)

    total, seen = double(jnp.float32(3))
    assert (float(total), float(seen["twice"])) == (7, 6)
