"""Position encodings equal their published formulas, and each other where they should."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.position import (
    NTK,
    ALiBi,
    CoPE,
    LinearScaling,
    Llama3,
    LogLength,
    NoPE,
    Pairs,
    RoPE,
    YaRN,
)
from mukv.position.alibi import slopes

HEAD_DIM = 8


def draw(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def pairs(queries: int, keys: int, query: jax.Array | None = None, scale: float = 1.0) -> Pairs:
    """Make positions for the last `queries` of `keys` tokens, which attend to all keys."""
    query_position = jnp.arange(keys - queries, keys)[None]
    key_position = jnp.arange(keys)[None, None]
    visible = query_position[:, None, :, None] >= key_position[:, :, None]
    if query is None:
        query = jnp.zeros((1, 1, 1, queries, HEAD_DIM))
    return Pairs(query, query_position, key_position, visible, True, scale)


def products(rope: RoPE, shift: int) -> jax.Array:
    query, key = draw(1, 2, 6, HEAD_DIM), draw(1, 2, 6, HEAD_DIM, seed=1)
    position = jnp.arange(6)[None, None] + shift
    return jnp.einsum("bhqd,bhkd->bhqk", rope.rotate(query, position), rope.rotate(key, position))


@pytest.mark.parametrize(
    "rope",
    [
        RoPE(),
        RoPE(pairing="interleaved"),
        RoPE(p=0.5),
        RoPE(partial=0.5),
        RoPE(base=100.0, scaling=YaRN(factor=4.0, original_length=16, fast=2.0)),
    ],
)
def test_products_depend_on_distance_alone(rope):
    np.testing.assert_allclose(products(rope, 0), products(rope, 57), atol=1e-4)


def test_pairings_are_one_model_in_another_order():
    x, position = draw(1, 2, 5, HEAD_DIM), jnp.arange(5)[None, None]
    order = np.arange(HEAD_DIM).reshape(-1, 2).T.ravel()  # half[m] = interleaved[2m]
    half = RoPE().rotate(x[..., order], position)
    interleaved = RoPE(pairing="interleaved").rotate(x, position)
    np.testing.assert_array_equal(half, interleaved[..., order])


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        LinearScaling(),
        NTK(),
        Llama3(factor=1.0),
        YaRN(factor=1.0),
        YaRN(factor=1.0, rounded=False),
    ],
)
def test_no_scaling_is_rope(scaling):
    np.testing.assert_allclose(
        RoPE(scaling=scaling).frequencies(64), RoPE().frequencies(64), rtol=3e-7
    )


def test_p_rope_ends():
    x, position = draw(1, 1, 9, HEAD_DIM), jnp.arange(9)[None, None]
    np.testing.assert_array_equal(RoPE(p=1.0).rotate(x, position), RoPE().rotate(x, position))
    for still in (RoPE(p=0.0), RoPE(partial=0.0)):
        np.testing.assert_array_equal(still.rotate(x, position), x)


def test_partial_rotary_and_p_rope_differ():
    """Partial RoPE rotates the first d/2 dimensions like a small head; p-RoPE the fastest half of
    the pairs."""
    partial, p = RoPE(partial=0.5).frequencies(16), RoPE(p=0.5).frequencies(16)
    np.testing.assert_allclose(partial, 10_000.0 ** -(np.arange(0, 8, 2) / 8))
    np.testing.assert_allclose(p[:4], 10_000.0 ** -(np.arange(0, 8, 2) / 16))
    assert not p[4:].any()


def test_ntk_is_a_larger_base():
    base = 10_000.0 * 4.0 ** (64 / 62)
    np.testing.assert_allclose(
        RoPE(scaling=NTK(factor=4.0)).frequencies(64), RoPE(base=base).frequencies(64), rtol=3e-7
    )


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    rope = RoPE(scaling=YaRN(factor=8.0, original_length=4096))
    ratio = rope.frequencies(128) / RoPE().frequencies(128)
    # dim(r) = d ln(L / 2 pi r) / (2 ln base): 20.9 for 32 turns, 45.03 for one.
    assert (ratio[:21] == 1).all()
    assert ratio[21] < 1
    np.testing.assert_allclose(ratio[46:], 1 / 8)
    assert (np.diff(ratio[20:47]) < 0).all()
    warmth = 0.1 * math.log(8) + 1
    assert rope.scaling.rotation_factor == warmth
    assert rope.logit_factor == 1
    deepseek = dataclasses.replace(rope.scaling, temperature="logits")
    assert RoPE(scaling=deepseek).logit_factor == warmth**2
    one = jnp.ones((1, 1, 1, 128))
    np.testing.assert_allclose(rope.rotate(one, jnp.zeros((1, 1, 1), jnp.int32)), warmth, rtol=1e-6)


def test_alibi_slopes():
    np.testing.assert_allclose(slopes(8), [2.0**-h for h in range(1, 9)])
    extra = [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    np.testing.assert_allclose(slopes(12), [*slopes(8), *extra])


def test_alibi_slopes_are_of_query_heads():
    logits = ALiBi().bias({}, jnp.zeros((1, 2, 2, 1, 4)), pairs(1, 4))
    expected = -slopes(4).reshape(1, 2, 2, 1, 1) * np.arange(3, -1, -1)
    np.testing.assert_allclose(logits, expected, rtol=1e-6)


def test_log_length_is_flat_at_its_typical_length():
    nope = NoPE(temperature=LogLength(typical=9))
    query = draw(1, 2, 2, 3, HEAD_DIM)
    weights = {"sharpness": jnp.ones(4)}
    made = nope.temper(weights, query, jnp.array([[2, 8, 80]]))
    np.testing.assert_allclose(
        made, query * jnp.array([0.5, 1.0, 2.0])[None, None, None, :, None], rtol=1e-6
    )


class TestCoPE:
    cope = CoPE(positions=6)

    def bias(self, gate_logit: float | None, table: jax.Array, cope: CoPE | None = None):
        query = draw(1, 1, 2, 4, HEAD_DIM)
        logits = draw(1, 1, 2, 4, 9, seed=2)
        if gate_logit is not None:
            logits = jnp.full_like(logits, gate_logit)
        made = (cope or self.cope).bias({"table": table}, logits, pairs(4, 9, query, 0.5))
        return made - logits, query

    def test_open_gates_are_relative_positions(self):
        """If every gate is 1, a position is the number of tokens from the key to the query, both
        counted."""
        table = draw(HEAD_DIM, 6, seed=3)
        bias, query = self.bias(50.0, table)
        distance = np.arange(5, 9)[:, None] - np.arange(9) + 1
        value = np.asarray(query @ table)
        for q, row in enumerate(distance):
            for k, count in enumerate(row):
                if count > 0:
                    np.testing.assert_allclose(
                        bias[0, 0, :, q, k], value[0, 0, :, q, min(count, 5)], atol=2e-5
                    )

    def test_unscaled_table(self):
        table = draw(HEAD_DIM, 6, seed=3)
        scaled, _ = self.bias(None, table)
        free, _ = self.bias(None, table, CoPE(positions=6, scaled=False))
        np.testing.assert_allclose(free, scaled / 0.5, atol=1e-5)

    def test_zero_table_is_nope_but_learns(self):
        zero = jnp.zeros((HEAD_DIM, 6))
        assert not self.bias(None, zero)[0].any()
        gradient = jax.grad(lambda table: self.bias(None, table)[0].sum())(zero)
        assert (jnp.abs(gradient).max(axis=0) > 0).all()

    def test_direct_sum(self):
        """The bias equals the formula, computed for each pair in a loop."""
        table = draw(HEAD_DIM, 6, seed=3)
        logits, query = np.asarray(draw(1, 1, 2, 4, 9, seed=2)), None
        bias, query = self.bias(None, table)
        value, gates = np.asarray(query @ table), 1 / (1 + np.exp(-logits))
        for head in range(2):
            for q in range(4):
                for k in range(q + 6):
                    p = min(gates[0, 0, head, q, k : q + 6].sum(), 5)
                    low = int(p)
                    high = min(low + 1, 5)
                    z = value[0, 0, head, q]
                    expected = z[low] + (p - low) * (z[high] - z[low])
                    np.testing.assert_allclose(bias[0, 0, head, q, k], expected, atol=1e-5)

    def test_order_of_entries_does_not_matter(self):
        table = draw(HEAD_DIM, 6, seed=3)
        query, logits = draw(1, 1, 2, 4, HEAD_DIM), draw(1, 1, 2, 4, 9, seed=2)
        straight = pairs(4, 9, query)
        shuffle = np.random.default_rng(0).permutation(9)
        ring = dataclasses.replace(
            straight,
            key_position=straight.key_position[..., shuffle],
            visible=straight.visible[..., shuffle],
            ordered=False,
        )
        made = self.cope.bias({"table": table}, logits[..., shuffle], ring)
        expected = self.cope.bias({"table": table}, logits, straight)[..., shuffle]
        np.testing.assert_allclose(
            jnp.where(ring.visible[:, :, None], made, 0),
            jnp.where(ring.visible[:, :, None], expected, 0),
            atol=1e-5,
        )


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: RoPE(base=1.0), "base"),
        (lambda: RoPE(p=1.5), "p"),
        (lambda: RoPE(partial=-0.1), "partial"),
        (lambda: RoPE(partial=0.4).check(8, 1), "head_dim"),
        (lambda: RoPE().check(7, 1), "head_dim"),
        (lambda: LinearScaling(factor=0.5), "factor"),
        (lambda: YaRN(slow=3.0, fast=2.0), "slow"),
        (lambda: Llama3(low_frequency_factor=5.0), "low_frequency_factor"),
        (lambda: CoPE(positions=1), "positions"),
        (lambda: LogLength(typical=1), "typical"),
    ],
)
def test_refused(make, field):
    with pytest.raises(BadInput, match=field):
        make()
