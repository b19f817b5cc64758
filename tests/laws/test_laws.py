"""Laws 1 to 5 of the house over every combination that exists.

One test per combination: all its laws share the weights and the compiled forward pass, which
keeps the whole matrix in seconds.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.compute import Compute
from mukv.core.params import named
from mukv.model.loss import summed_loss
from tests.laws import matrix
from tests.laws.matrix import COMBINATIONS, EXACT, LENGTH


@pytest.fixture(params=COMBINATIONS, ids="-".join)
def model(request):
    return matrix.build(*request.param)


@pytest.fixture
def tree(model):
    return matrix.weights(model)


def test_causality_is_exact(model, tree):
    """Law 1: changing token t changes no logit before t, to the bit, and changes that at t."""
    ids = matrix.tokens(1)
    changed = jnp.stack([ids[0].at[t].set((ids[0, t] + 1) % matrix.VOCAB) for t in range(LENGTH)])
    rows = np.asarray(matrix.logits(model, tree, jnp.concatenate([ids, changed])))
    for t in range(LENGTH):
        np.testing.assert_array_equal(rows[t + 1, :t], rows[0, :t])
        assert (rows[t + 1, t] != rows[0, t]).any()


def test_decode_is_prefill(model, tree):
    """Law 2: token by token, over tails that fold and rings that wrap, rows of unequal length."""
    ids = matrix.tokens()
    whole = np.asarray(matrix.logits(model, tree, ids))
    count = np.array([3, 6])
    unstacked = model.unstack(tree)
    cache = model.empty_cache(2, LENGTH, tail=2, dtype=EXACT.type)
    prefill = jax.jit(lambda w, c, t, n: model.prefill(w, c, t, n, compute=EXACT))
    step = jax.jit(lambda w, c, t: model.step(w, c, t, compute=EXACT))
    scores, cache = prefill(unstacked, cache, ids[:, : count.max()], jnp.asarray(count))
    for _ in range(LENGTH - count.max()):
        np.testing.assert_allclose(scores, whole[[0, 1], count - 1], atol=2e-5)
        if cache.filled == cache.tail_size:
            cache = model.fold(cache)
        scores, cache = step(unstacked, cache, ids[jnp.arange(2), count])
        count += 1
    np.testing.assert_allclose(scores, whole[[0, 1], count - 1], atol=2e-5)


def test_prefill_continues(model, tree):
    """Law 2: a text read in two prefills equals the text read in one."""
    ids = matrix.tokens()
    whole = np.asarray(matrix.logits(model, tree, ids))
    unstacked, count = model.unstack(tree), jnp.array([5, 5])
    cache = model.empty_cache(2, LENGTH, tail=2, dtype=EXACT.type)
    _, cache = model.prefill(unstacked, cache, ids[:, :5], count, compute=EXACT)
    rest = jnp.array([LENGTH - 5] * 2)
    scores, _ = model.prefill(unstacked, cache, ids[:, 5:], rest, fresh=False, compute=EXACT)
    np.testing.assert_allclose(scores, whole[:, -1], atol=2e-5)


def test_every_weight_learns(model, tree):
    """Law 3: each weight, in each layer, gets a gradient that is not zero."""
    ids = matrix.tokens()
    targets = jnp.roll(ids, -1, axis=1)

    def loss(tree):
        return summed_loss(model, tree, ids, targets, jnp.ones(ids.shape), compute=EXACT)

    for name, gradient in named(jax.jit(jax.grad(loss))(tree)).items():
        by_layer = gradient if name.startswith("stage") else gradient[None]
        for layer in by_layer:
            assert float(jnp.abs(layer).max()) > 0, name


def test_bytes_are_true(model):
    """Law 4: the cache as allocated weighs what is computed from `write`."""
    for batch, length, tail in ((1, 2, 1), (3, LENGTH, 4)):
        cache = model.empty_cache(batch, length, tail, EXACT.type)
        assert cache.nbytes() == model.cache_bytes(batch, length, tail, EXACT.type)
    writers = [slot for slot in cache.slots]
    assert len(writers) == sum(layer.reads is None for layer in model.layers)


def test_packing_isolates(model, tree):
    """Law 5: documents packed in one row equal the same documents alone."""
    ids = matrix.tokens(1)
    cuts = [0, 4, 5, LENGTH]
    lengths = np.diff(cuts)
    segment = jnp.asarray(np.repeat(np.arange(len(lengths)), lengths))[None]
    position = jnp.asarray(np.concatenate([np.arange(n) for n in lengths]))[None]
    packed = matrix.logits(model, tree, ids, position=position, segment=segment)
    for start, stop in zip(cuts[:-1], cuts[1:], strict=True):
        alone = matrix.logits(model, tree, ids[:, start:stop])
        np.testing.assert_allclose(packed[:, start:stop], alone, atol=2e-5)


def test_ways_of_computing_agree(model, tree):
    """Scan = unrolled, fused core = plain core, chunked loss = whole loss; gradients too."""
    ids = matrix.tokens()
    targets = jnp.roll(ids, -1, axis=1)

    def both(compute):
        def loss(tree):
            return summed_loss(model, tree, ids, targets, jnp.ones(ids.shape), compute=compute)

        return jax.jit(jax.value_and_grad(loss))(tree)

    plain = Compute("float32", "float32", unroll=True, fused=False)
    other = Compute("float32", "float32", unroll=False, rematerialise=True, loss_chunk=5)
    for one, two in zip(jax.tree.leaves(both(plain)), jax.tree.leaves(both(other)), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-4)
