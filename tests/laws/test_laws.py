"""Laws 1 to 5 over combinations of attention, position and layer plan. The rows that the laws of a
combination compare are one batch, which is compiled once. A law that compiles a further program to
compare with these takes every pair of parts instead of every triple."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.params import named
from mukv.model.counting import cache_bytes
from tests.laws import matrix
from tests.laws.matrix import COMBINATIONS, CUTS, EXACT, LENGTH, OTHER, QUICK, QUICK_BY_PROGRAM
from tests.pairs import params


@pytest.fixture(scope="module")
def case(request):
    yield matrix.Case(matrix.build(*request.param))
    # Hundreds of compiled models would fill the memory of a small machine.
    jax.clear_caches()


def over(program):
    """Parametrize a law by the combinations whose `program` the quick round compiles."""
    rows = params(COMBINATIONS, QUICK_BY_PROGRAM[program], "-".join)
    return pytest.mark.parametrize("case", rows, indirect=True)


@over("forward")
def test_causality_is_exact(case):
    """Law 1: changing token t changes no logit before t, to the bit, and changes that at t."""
    for t, row in enumerate(case.changed):
        np.testing.assert_array_equal(row[:t], case.whole[0, :t])
        assert (row[t] != case.whole[0, t]).any()


@over("decode")
def test_decode_is_prefill(case):
    """Law 2: decoding token by token equals one prefill, over folds of tails and rings that wrap,
    for rows of unequal length; a text read in two pieces equals the text at once."""
    model, count = case.model, np.array([3, 6])
    weights = model.unstack(case.weights)
    start = model.empty_cache(2, LENGTH, tail=2, dtype=EXACT.type)
    # Both pieces have the same shape, so that one program reads them.
    prefill = jax.jit(partial(model.prefill, fresh=False, compute=EXACT))
    step = jax.jit(partial(model.step, compute=EXACT))
    fold = jax.jit(model.fold)
    scores, cache = prefill(weights, start, case.ids[:, :9], jnp.asarray(count))
    rest = jnp.asarray(LENGTH - count)
    following = np.stack([np.roll(ids, -n)[:9] for ids, n in zip(case.ids, count, strict=True)])
    ends, _ = prefill(weights, cache, following, rest)
    np.testing.assert_allclose(ends, case.whole[:, -1], atol=case.tolerance)
    for _ in range(LENGTH - 6):
        np.testing.assert_allclose(scores, case.whole[[0, 1], count - 1], atol=case.tolerance)
        if cache.filled == cache.tail_size:
            cache = fold(weights, cache)
        scores, cache = step(weights, cache, case.ids[[0, 1], count])
        count += 1
    np.testing.assert_allclose(scores, case.whole[[0, 1], count - 1], atol=case.tolerance)


@pytest.mark.parametrize("case", params(QUICK, [], "-".join), indirect=True)
def test_a_fresh_prefill_is_one_into_an_empty_cache(case):
    """Law 2: prefill into an empty cache gives the same logits and entries with `fresh` and
    without."""
    model, count = case.model, jnp.asarray([3, 6])
    weights = model.unstack(case.weights)
    start = model.empty_cache(2, LENGTH, tail=2, dtype=EXACT.type)
    prefill = jax.jit(partial(model.prefill, compute=EXACT), static_argnames="fresh")
    fresh, continued = (
        prefill(weights, start, case.ids[:, :6], count, fresh=each) for each in (True, False)
    )
    for one, two in zip(jax.tree.leaves(fresh), jax.tree.leaves(continued), strict=True):
        np.testing.assert_allclose(one, two, atol=case.tolerance)


@over("gradient")
def test_every_weight_learns(case):
    """Law 3: each weight, in each layer, gets a gradient that is not zero."""
    for name, gradient in named(case.gradient).items():
        for layer in gradient if name.startswith("stage") else [gradient]:
            assert float(np.abs(layer).max()) > 0, name


@over("forward")
def test_bytes_are_true(case):
    """Law 4: the bytes of the allocated cache are those computed from `write`."""
    for batch, length, tail in ((1, 2, 1), (3, LENGTH, 4)):
        cache = case.model.empty_cache(batch, length, tail, EXACT.type)
        assert cache.nbytes() == cache_bytes(case.model, batch, length, tail, EXACT.type)
        writers = [layer for layer in case.model.layers if layer.reads is None]
        assert len(cache.slots) == sum(len(layer.attention.bags) for layer in writers)


@over("forward")
def test_packing_isolates(case):
    """Law 5: documents packed in one row equal the same documents alone."""
    for alone, start, stop in zip(case.alone, CUTS[:-1], CUTS[1:], strict=True):
        expected = alone[: stop - start]
        np.testing.assert_allclose(case.packed[start:stop], expected, atol=case.tolerance)


SCANNED = [row for row in COMBINATIONS if row[0] == "gqa" and row[2] == "reuse"][:1]
"""A model whose repeated layers, one of which reads another, are a scan unless unrolled."""
PAIRS = dict.fromkeys([*SCANNED, *QUICK])


@pytest.mark.parametrize("case", params(PAIRS, SCANNED, "-".join), indirect=True)
def test_ways_of_computing_agree(case):
    """Scan = unrolled, fused core = plain core, chunked loss = whole loss, in loss and
    gradients."""
    loss, gradient = matrix.loss_and_gradient(case.model, OTHER)(case.weights, case.ids)
    np.testing.assert_allclose(loss, case.loss, rtol=1e-5)
    for one, two in zip(jax.tree.leaves(gradient), jax.tree.leaves(case.gradient), strict=True):
        np.testing.assert_allclose(one, two, rtol=2e-4, atol=2e-4)
