"""Quantisation to 8 and 4 bits: errors are at most half a step, and key channels are separate."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention.recalled import Dense
from mukv.cache import Policy
from mukv.cache.quantised import GROUP, Int4, Int8
from mukv.cache.shelf import BLOCK, InBlocks
from tests.laws import matrix

STORES = {"int8": (Int8(), 255), "int4": (Int4(), 15)}
SHAPE = (2, 2, 2 * GROUP, 40)


def drawn(kind: str) -> np.ndarray:
    random = np.random.default_rng(0)
    x = random.standard_normal(SHAPE).astype(np.float32)
    scales = 10.0 ** random.integers(-30, 31, SHAPE[-1])
    if kind == "scales":
        x *= scales.astype(np.float32)
    elif kind == "outlier":
        x[..., 7] += 300
    elif kind == "outliers":
        x[..., ::5] += 1e5
    elif kind == "tiny":
        x *= 1e-6
    elif kind == "large":
        x *= 1e5
    elif kind == "huge":
        x = np.sign(x) * np.float32(1e37)
    elif kind == "zeros":
        x[:] = 0
    elif kind == "constant":
        x[:] = -7.25
    return x


def stored(key: bool, store, x: np.ndarray, there: np.ndarray) -> np.ndarray:
    parts = store.encode(key, jnp.asarray(x), jnp.asarray(there))
    for part in parts.values():
        assert not np.isnan(np.asarray(part, np.float32)).any()
    return np.asarray(store.decode(key, parts, x.shape[-1]), np.float64)


KINDS = (
    *("normal", "scales", "outlier", "outliers", "tiny", "large", "huge", "zeros", "constant"),
)


@pytest.mark.product
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", STORES)
def test_keys_by_channel(bits, kind):
    """No key has an error above half a step of its channel and group of tokens."""
    store, levels = STORES[bits]
    x, there = drawn(kind), np.ones(SHAPE[:3], bool)
    there[1, :, GROUP + 5 :] = False
    found = stored(True, store, x, there)
    for run in (slice(0, GROUP), slice(GROUP, 2 * GROUP)):
        seen = np.where(there[:, :, run, None], x[:, :, run].astype(np.float64), np.nan)
        with np.errstate(all="ignore"):
            span = np.nanmax(seen, 2, keepdims=True) - np.nanmin(seen, 2, keepdims=True)
            error = np.abs(found[:, :, run] - seen)
        # Half a step, the rounding of the step, and the float32 rounding of the sum.
        limit = span / levels * 0.52 + 2e-6 * np.nanmax(np.abs(seen), 2, keepdims=True) + 1e-37
        assert (error <= limit)[~np.isnan(error)].all()


@pytest.mark.product
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", STORES)
def test_values_by_token(bits, kind):
    store, levels = STORES[bits]
    x = drawn(kind)
    found = stored(False, store, x, np.ones(SHAPE[:3], bool))
    for group in (slice(0, GROUP), slice(GROUP, None)):
        seen = x[..., group].astype(np.float64)
        largest = np.abs(seen).max(-1, keepdims=True)
        step = 2 * largest / (levels - 1)
        limit = 0.52 * step + 2e-6 * largest + 1e-37
        assert (np.abs(found[..., group] - seen) <= limit).all()


@pytest.mark.parametrize("bits", STORES)
def test_bfloat16_entries(bits):
    store, levels = STORES[bits]
    x = np.asarray(jnp.asarray(drawn("outlier"), jnp.bfloat16))
    found = stored(True, store, x, np.ones(SHAPE[:3], bool))
    assert np.abs(found - x.astype(np.float64))[..., :7].max() < 8 / levels


def test_a_bias_of_one_channel_changes_no_other():
    """A large bias of channel 7 does not change how the other channels are stored."""
    for store, _ in STORES.values():
        there = np.ones(SHAPE[:3], bool)
        plain, biased = (stored(True, store, drawn(k), there) for k in ("normal", "outlier"))
        others = np.arange(SHAPE[-1]) != 7
        np.testing.assert_array_equal(plain[..., others], biased[..., others])


@pytest.mark.product
@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("gqa", {"key"}),
        ("shared-kv", set()),
        ("latent", {"key"}),
        ("tied", {"key"}),
        ("tensor-product", {"key", "key_heads"}),
    ],
)
def test_keys_of_each_variant_are_quantised_by_channel(name, keys):
    """Only the keys of each variant are quantised by channel, with one step per group of tokens."""
    attention = matrix.ATTENTIONS[name]
    policy = Policy.parse("int4", 1.0)
    body = policy.body(attention, matrix.D_MODEL, 1, 2 * GROUP, jnp.dtype("float32"), (0, 1))
    by_channel = {n for n, parts in body.shelf.stored.items() if parts["step"].shape[2] == 2}
    assert by_channel == keys


@pytest.mark.product
@pytest.mark.parametrize("kind", ["normal", "outlier", "outliers", "tiny", "huge", "zeros"])
@pytest.mark.parametrize("bits", STORES)
@pytest.mark.parametrize("key", [True, False])
def test_entries_may_be_encoded_at_every_fold(bits, kind, key):
    """After 40 folds the error is that of one encoding with 4 bits, and at most that of two with 8
    bits, where the rounding of steps leaves the largest level unused."""
    store, x = STORES[bits][0], drawn(kind)
    there = jnp.ones(SHAPE[:3], bool)

    @jax.jit
    def again(x, number):
        def one(_, x):
            return store.decode(key, store.encode(key, x, there), SHAPE[-1])

        return jax.lax.fori_loop(0, number, one, x)

    once, often = (np.float64(again(jnp.asarray(x), number)) for number in (1, 40))
    size = np.abs(x).max(axis=2 if key else 3, keepdims=True)
    error = np.abs(once - x) / np.where(size > 0, size, 1)
    most = {"int4": 1.02, "int8": 2.02}[bits] * error.max() + 1e-6
    assert (np.abs(often - x) / np.where(size > 0, size, 1)).max() < most


@pytest.mark.product
def test_decoding_at_once_is_decoding_block_by_block():
    """Decoding a body at once, as on accelerators, equals decoding it block by block, as on a
    CPU."""
    random, slots = np.random.default_rng(0), BLOCK + 64
    keys, values = random.standard_normal((2, 2, 2, slots, 8)).astype(np.float32)

    def block(start, size):
        key, value = (jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in (keys, values))
        return Dense((key,), value)

    for queries in (1, 3):
        query = jnp.asarray(random.standard_normal((2, 2, 2, queries, 8)), jnp.float32)
        weights = jnp.asarray(random.random((2, 2, 2, queries, slots)), jnp.float32)
        some = InBlocks(slots, block)
        for one, other in (
            (some._products((query,)), some._all_products((query,))),
            (some._mixture(weights), some._all_mixture(weights)),
        ):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
