"""ThinK stores the channels of keys that a formula in numpy names, and no bytes of the others."""

from __future__ import annotations

from itertools import pairwise, product

import jax.numpy as jnp
import numpy as np
import pytest

from mukv.cache import Policy
from mukv.cache.shelf import InBlocks
from mukv.cache.think import ThinK
from mukv.core.errors import BadInput
from mukv.model.counting import cache_bytes
from tests.laws.matrix import EXACT
from tests.laws.test_policies import LENGTH, TAIL, One, model_of, positions
from tests.pairs import params

ROOM = 2, LENGTH, TAIL, EXACT.type


@pytest.fixture(scope="module")
def one():
    return One()


def important(one, row, head, places, window, kept):
    """Return the channels with the largest product of mean squares of queries and keys."""
    count = one.count[row]
    queries = np.asarray(one.queries, np.float64)[row, head, :, max(count - window, 0) : count]
    keys = np.asarray(one.key[row, head][places], np.float64)
    score = (queries**2).mean((0, 1)) * (keys**2).mean(0)
    return np.sort(np.argsort(-score)[:kept])


CASES = [
    ("think", 32, 4),
    ("think(ratio=0.3,window=5)", 5, 6),
    ("knorm:12+think(ratio=0.9)", 32, 1),
]


@pytest.mark.parametrize(("name", "window", "kept"), params(CASES, CASES[2:], unpack=True))
def test_channels(one, name, window, kept):
    """Stored channels are those of the formula over the kept keys, also after a fold; values and
    the stored channels are unchanged, the others are zero."""
    before, after = one.body(name, 1.0)
    for (row, count), head in product(enumerate(one.count), range(2)):
        places = positions(before, row, head)
        assert len(places) == (12 if "knorm" in name else count)
        expected = important(one, row, head, places, window, kept)
        for body in (before, after):
            stored = body.shelf.stored["key"]
            assert stored["exact"].shape[-1] == kept
            np.testing.assert_array_equal(stored["channel"][row, head, 0], expected)
            entries, index = body.shelf.entries(), one.rows(row)
            held = np.asarray(body.shelf.position)[row]
            held = held[min(head, len(held) - 1)]
            own = [index[p] for p in held[held >= 0]]
            key, value = (
                np.asarray(entries.tensors[part])[row, head][held >= 0] for part in ("key", "value")
            )
            np.testing.assert_array_equal(value, one.value[row, head][own])
            whole = one.key[row, head][own]
            np.testing.assert_array_equal(key[:, expected], whole[:, expected])
            assert not np.delete(key, expected, axis=1).any()


@pytest.mark.parametrize("name", ["think", "snapkv:0.5+think(ratio=0.75)"])
def test_bytes(name):
    """Law 4: of a key of 8 float32 the stored channels, and one list of them per head."""
    policy = Policy.parse(name)
    cache = model_of("gqa", "rope").empty_cache(*ROOM, policy)
    assert isinstance(policy.store, ThinK)
    kept, evicts = 8 - int(8 * policy.store.ratio), policy.keep.evicts
    slots = LENGTH // 2 if evicts else LENGTH
    body = 2 * slots * (kept + 8) * 4 + 2 * kept * 4 + (2 if evicts else 1) * slots * 4
    tail = TAIL * 2 * 2 * 8 * 4
    asked = TAIL * 4 * 8 * 4 if evicts else 0  # think keeps no queries in the tail
    assert cache.nbytes() == 2 * (body + tail + asked) + 4 * (2 + 1)
    assert cache_bytes(model_of("gqa", "rope"), *ROOM, policy) == cache.nbytes()


@pytest.mark.product
def test_errors_grow_with_the_channels_left_out(one):
    """Products with keys are exact without a channel left out, and worse with each further one."""
    query = np.asarray(one.queries)[0, :, :, -1]
    errors = []
    for ratio in (0.0, 0.25, 0.5, 0.75):
        body, _ = one.body(f"think(ratio={ratio})", 1.0)
        key = np.asarray(body.shelf.entries().tensors["key"])[0][:, : one.count[0]]
        exact = np.einsum("hgd,hkd->hgk", query, one.key[0][:, : one.count[0]])
        errors.append(np.abs(np.einsum("hgd,hkd->hgk", query, key) - exact).mean())
    assert errors[0] == 0
    assert all(less < more for less, more in pairwise(errors))


@pytest.mark.product
def test_blocks_are_those_of_the_whole(one, monkeypatch):
    """A body that is read block by block has the products and mixtures of the decoded one."""
    body, _ = one.body("think", 1.0)

    def recall(entries):
        return one.attention.recall(one.read, entries)

    query, random = one.queries[:, :, :, -1:], np.random.default_rng(0)
    weights = jnp.asarray(random.random((2, 2, 2, 1, body.shelf.slots)), jnp.float32)
    whole = recall(body.shelf.entries())
    monkeypatch.setattr("mukv.cache.shelf.BLOCK", 16)
    blocks, _ = body.shelf.whole(recall)
    assert isinstance(blocks, InBlocks)
    np.testing.assert_allclose(blocks.products((query,)), whole.products((query,)), atol=1e-6)
    np.testing.assert_allclose(blocks.mixture(weights), whole.mixture(weights), atol=1e-5)


@pytest.mark.parametrize(
    ("attention", "name", "words"),
    [
        ("latent", "think", "no think: layer 0 does not store one key and one value per head"),
        ("gqa", "snapkv+adaptive+think", "no think: the heads of a pool (adaptive)"),
        ("gqa", "think(ratio=1)", "think.ratio: got 1.0; at least 0 and below 1"),
        ("gqa", "think(window=0)", "at least 1"),
    ],
)
def test_refused(attention, name, words):
    with pytest.raises(BadInput) as error:
        model_of(attention, "rope").empty_cache(*ROOM, Policy.parse(name, 0.5))
    assert words in str(error.value)
