"""A block of known tokens equals its steps, and a recorded text compresses as prefill does."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.cache import FULL, RECORD, Policy
from mukv.cache.base import QUERY
from mukv.model import LanguageModel
from tests.laws import matrix
from tests.laws.matrix import EXACT
from tests.pairs import params

LENGTH, PROMPT, TAIL = 46, 38, 4
COUNT = np.array([38, 33])
QUICK = [
    ("gqa", "rope", "plain", "expected+int8"),
    ("gqa", "rope", "plain", "topk"),
]
REST = [
    *(("gqa", "rope", "plain", name) for name in ("full", "snapkv", "h2o")),
    *(("gqa", "rope", "plain", name) for name in ("topp", "pages+int8", "int4")),
    *(("gqa", "rope", "plain", name) for name in ("snapkv+chunk+critical", "lagkv", "leverage")),
    ("gqa-dressed", "rope-yarn", "reuse-both", "tova+clusters"),
    ("gqa", "alibi", "plain", "snapkv+adaptive"),
    ("latent", "rope", "last-layers", "keydiff+sparq"),
    ("gqa", "cope", "mixed", "int8+topk"),
    ("tensor-product", "rope", "hybrid", "h2o+pyramid"),
    ("shared-kv-normed", "p-rope", "experts", "random+pages:0.8"),
    ("hca", "rope", "mixed", "streaming"),
]


def folded(cache):
    """Return the cache without tails, whose entries remain after a fold but are not read."""
    return replace(cache, slots=tuple(replace(slot, tail={}) for slot in cache.slots))


def assert_close(found, expected, atol=3e-5):
    """Assert that caches after a fold are equal up to rounding."""
    found, expected = folded(found), folded(expected)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Numbers of a group that are equal but for rounding have a tiny step, and any code.
        if one.dtype == np.uint8:
            assert one.shape == other.shape
            continue
        one, other = (np.asarray(x, np.float64) for x in (one, other))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=atol)
    for ours, theirs in zip(decoded(found), decoded(expected), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=atol)


def decoded(cache):
    """Yield the tensors of the entries of each slot, zero for entries that are not there."""
    for slot in cache.slots:
        entries = slot.body.entries(slot.store.count(cache.length))
        there = True if entries.valid is None else entries.valid[..., None]
        yield from (np.where(there, tensor, 0) for tensor in entries.tensors.values())


def model_of(attention, position, plan):
    return matrix.build(attention, position, plan)


@pytest.fixture(scope="module", params=params([*QUICK, *REST], QUICK, "-".join))
def case(request):
    attention, position, plan, name = request.param
    model = model_of(attention, position, plan)
    weights = jax.tree.map(jnp.asarray, model.unstack(matrix.weights(model)))
    yield model, weights, Policy.parse(name, 0.6)
    jax.clear_caches()


def prefilled(model, weights, policy):
    """Return logits and cache of two rows of unequal length."""
    cache = model.empty_cache(2, LENGTH, TAIL, EXACT.type, policy)
    ids = jnp.asarray(matrix.tokens(2, LENGTH)[:, :PROMPT])
    return model.prefill(weights, cache, ids, jnp.asarray(COUNT), compute=EXACT)


def following(first):
    """Return the next tokens of each row."""
    return matrix.tokens(2, LENGTH)[np.arange(2)[:, None], COUNT[:, None] + first + np.arange(TAIL)]


@pytest.mark.product
def test_a_block_is_its_steps(case):
    """Law 2: a block equals its steps in logits, entries and state of the policy, over two
    folds."""
    model, weights, policy = case
    by_steps = jax.jit(partial(LanguageModel.read_block, model), static_argnums=3)
    _, cache = jax.jit(lambda w: prefilled(model, w, policy))(weights)
    other = cache
    for block in range(2):
        ids = jnp.asarray(following(block * TAIL))
        logits, cache = model.read_block(weights, cache, ids, EXACT)
        expected, other = by_steps(weights, other, ids, EXACT)
        np.testing.assert_allclose(logits, expected, atol=3e-5)
        assert_close(cache, other)
    ids = jnp.asarray(following(0))
    logits, same = model.read_block(weights, cache, ids, EXACT, joins=False)
    expected, _ = by_steps(weights, other, ids, EXACT)
    np.testing.assert_allclose(logits, expected, atol=3e-5)
    assert same is cache


@pytest.mark.product
def test_many_continuations_of_one_cache(case):
    """`vmap` over blocks with one cache gives the logits of each block."""
    model, weights, policy = case
    _, cache = prefilled(model, weights, policy)
    several = jnp.stack([jnp.asarray(following(first)) for first in (0, 1, 4)])

    def logits(ids):
        return model.read_block(weights, cache, ids, EXACT, joins=False)[0]

    found = jax.vmap(logits)(several)
    for one, ids in zip(found, several, strict=True):
        np.testing.assert_allclose(one, logits(ids), atol=3e-5)


@pytest.mark.product
def test_a_recorded_text_is_compressed_as_by_prefill(case):
    """A text recorded at once or in two parts is compressed as prefill compresses it."""
    model, weights, policy = case
    expected, cache = prefilled(model, weights, policy)
    found, recorded = prefilled(model, weights, RECORD)
    np.testing.assert_allclose(found, expected, atol=3e-5)
    empty = model.empty_cache(2, LENGTH, TAIL, EXACT.type, policy)
    assert_close(model.compressed(weights, recorded, empty), cache)
    start, more = np.array([30, 33]), np.array([8, 0])
    ids = jnp.asarray(matrix.tokens(2, LENGTH))
    blank = model.empty_cache(2, LENGTH, TAIL, EXACT.type, RECORD)
    _, recorded = model.prefill(weights, blank, ids[:, :33], jnp.asarray(start), compute=EXACT)
    rest = ids[:, 30:38]
    recorded = model.prefill(weights, recorded, rest, jnp.asarray(more), False, EXACT)[1]
    assert_close(model.compressed(weights, recorded, empty), cache, atol=1e-4)


@pytest.mark.product
@pytest.mark.parametrize("window", [1, 3])
def test_a_tail_keeps_the_queries_of_the_window_alone(window):
    """The tail stores only the queries of the window; the kept entries are those with all
    queries."""
    model = model_of("gqa", "rope", "plain")
    weights, policy = model.unstack(matrix.weights(model)), Policy.parse("snapkv", 0.5)
    policy = replace(policy, keep=replace(policy.keep, window=window))
    _, cache = prefilled(model, weights, policy)
    assert cache.slots[0].tail[QUERY].shape[2] == window
    ids = jnp.asarray(following(0))
    _, expected = model.read_block(weights, cache, ids, EXACT)
    for token in ids.T:
        _, cache = model.step(weights, cache, token, EXACT)
    assert_close(model.fold(weights, cache), expected)


def test_policies_that_differ_in_the_choice_alone_share_their_steps():
    model = model_of("gqa", "rope", "plain")
    found = set()
    for name in ("snapkv", "h2o", "expected", "knorm"):
        cache = model.empty_cache(1, LENGTH, TAIL, EXACT.type, Policy.parse(name, 0.5))
        slots = tuple(slot.for_steps() for slot in cache.slots)
        found.add(jax.tree.structure(slots))
    assert len(found) == 1


def test_a_block_has_learned_positions():
    model = replace(model_of("gqa", "rope", "plain"), positions="learned", context=2 * LENGTH)
    weights = jax.tree.map(jnp.asarray, model.unstack(matrix.weights(model)))
    _, cache = prefilled(model, weights, FULL)
    ids = jnp.asarray(following(0))
    logits, _ = model.read_block(weights, cache, ids, EXACT)
    expected, _ = LanguageModel.read_block(model, weights, cache, ids, EXACT)
    np.testing.assert_allclose(logits, expected, atol=3e-5)
