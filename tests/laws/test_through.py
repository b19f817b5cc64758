"""Training through a policy equals decoding under it in logits and gradients; choices are made
once, documents of a row are independent, and resuming is bit-equal."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.cache import Policy
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.model import Stage
from mukv.model.through import Through
from mukv.runs.config import load
from mukv.train.training import Training
from tests.laws import matrix
from tests.laws.matrix import EXACT
from tests.laws.test_resume import assert_same_bits, whole_and_resumed
from tests.pairs import params

LENGTH, TAIL, ROWS = 24, 6, 2
QUICK = [("gqa", "rope", "one", "snapkv+adaptive")]
REST = [
    ("gqa", "rope", "plain", "snapkv"),
    *(("gqa", "rope", "one", name) for name in ("streaming", "h2o", "tova+every(tokens=8)")),
    *(("gqa", "rope", "one", name) for name in ("expected", "keydiff", "cur", "lagkv(lag=4)")),
    *(("gqa", "rope", "one", name) for name in ("leverage(sketch=4)", "compactor(sinks=2)")),
    ("gqa-dressed", "rope-yarn", "reuse-both", "snapkv+critical"),
    ("latent", "rope", "last-layers", "keydiff"),
    ("gqa", "kerple", "plain", "random+pyramid(beta=2)"),
    ("tensor-product", "rope", "one", "h2o"),
    ("shared-kv-normed", "p-rope", "experts", "snapkv+chunk(size=2)"),
]


def model_of(attention, position, plan):
    """Make a model of the matrix, or one of a single layer for the plan "one"."""
    model = matrix.build(attention, position, "plain" if plan == "one" else plan)
    return replace(model, plan=(Stage(),)) if plan == "one" else model


def rows():
    """Return rows without a token that occurs twice: its keys, once they are rotated back, have
    equal scores in the first layer, so that rounding would decide which of them is kept."""
    random = np.random.default_rng(0)
    found = [random.permutation(matrix.VOCAB)[:LENGTH] for _ in range(ROWS)]
    return jnp.asarray(np.stack(found), jnp.int32)


def read(model, weights, ids, through, compute=EXACT, **where):
    result = model.forward(weights, ids, compute=compute, through=through, **where)
    return model.logits(weights, result.hidden, compute)


def decoded(model, weights, ids, through):
    """Return logits of the rows from an empty cache, a block at a time, with a fold after each."""
    cache = model.empty_cache(ROWS, LENGTH, TAIL, EXACT.type, through.policy)
    apart, found = model.unstack(weights), []
    for start in range(0, LENGTH, TAIL):
        logits, cache = model.read_block(apart, cache, ids[:, start : start + TAIL], EXACT)
        found.append(logits)
    return jnp.concatenate(found, axis=1)


@pytest.mark.parametrize("case", params([*QUICK, *REST], QUICK, "-".join))
def test_logits_and_gradients_are_those_of_the_cache(case):
    """Training is a dense pass under the mask of the policy's log; the cache drops entries."""
    attention, position, plan, name = case
    model, through = model_of(attention, position, plan), Through(Policy.parse(name, 0.5), TAIL)
    model.check_through(through, LENGTH)
    ids, random = rows(), np.random.default_rng(0)
    slope = jnp.asarray(random.standard_normal((*ids.shape, matrix.VOCAB)), jnp.float32) / LENGTH

    @jax.jit
    def both(weights):
        found = []
        for function in (read, decoded):

            def loss(weights, function=function):
                logits = function(model, weights, ids, through)
                return jnp.sum(logits * slope), logits

            found.append(jax.grad(loss, has_aux=True)(weights))
        return found, read(model, weights, ids, None)

    (mine, cached), full = both(jax.tree.map(jnp.asarray, matrix.weights(model)))
    np.testing.assert_allclose(mine[1], cached[1], atol=3e-5)
    assert float(jnp.abs(full - mine[1]).max()) > 1e-2
    there = named(cached[0])
    for weight, gradient in named(mine[0]).items():
        size = max(1.0, float(jnp.abs(there[weight]).max()))
        np.testing.assert_allclose(gradient / size, there[weight] / size, atol=1e-5, err_msg=weight)


@pytest.fixture(scope="module")
def single():
    """Return a model of one layer and its weights."""
    model = model_of("gqa", "rope", "one")
    return model, jax.tree.map(jnp.asarray, matrix.weights(model))


@pytest.mark.product
def test_documents_of_a_row_are_independent(single):
    """A document's choices do not depend on the others. They are those of the document alone if its
    first block ends where a block of the row does."""
    model, weights = single
    cuts = [0, 9, 20, LENGTH]
    segment, place = np.zeros((1, LENGTH), np.int32), np.zeros((1, LENGTH), np.int32)
    for number, (start, stop) in enumerate(pairwise(cuts)):
        segment[:, start:stop], place[:, start:stop] = number + 1, np.arange(stop - start)
    through = Through(Policy.parse("tova", 4.0), TAIL)
    where = {"position": jnp.asarray(place), "segment": jnp.asarray(segment)}
    run = jax.jit(lambda ids: read(model, weights, ids, through, **where))
    ids = rows()[:1]
    other = ids.at[:, 9:20].add(1).__mod__(matrix.VOCAB)
    found, changed = np.asarray(run(ids)), np.asarray(run(other))
    np.testing.assert_array_equal(found[:, :9], changed[:, :9])
    np.testing.assert_allclose(found[:, 20:], changed[:, 20:], atol=1e-6)
    assert np.abs(found - changed)[:, 9:20].max() > 1e-2

    # The blocks of the document at 9 to 20 end at 12 and 18.
    cache = model.empty_cache(1, 12, TAIL, EXACT.type, through.policy)
    apart = model.unstack(weights)
    for start, stop in ((9, 12), (12, 18), (18, 20)):
        logits, cache = model.read_block(apart, cache, ids[:, start:stop], EXACT)
        np.testing.assert_allclose(found[:, start:stop], logits, atol=3e-5)


@pytest.mark.parametrize("rematerialise", [True, "products"])
def test_choices_are_stored_and_not_made_again(single, rematerialise):
    """The backward pass has no sort of its own, even if it recomputes the layer."""
    model, weights = single
    through, ids = Through(Policy.parse("snapkv", 0.5), TAIL), rows()

    def loss(weights):
        compute = Compute("float32", "float32", True, rematerialise, loss_chunk=4)
        return jnp.sum(read(model, weights, ids, through, compute))

    def sorts(function):
        return str(jax.make_jaxpr(function)(weights)).count("top_k[")

    assert sorts(jax.grad(loss)) == sorts(loss) == 1


def test_a_tail_of_the_whole_row_drops_nothing(single):
    model, weights = single
    through = Through(Policy.parse("snapkv", 0.5), LENGTH)
    found = read(model, weights, rows(), through)
    np.testing.assert_array_equal(found, read(model, weights, rows(), None))


@pytest.mark.product
def test_resume_is_bit_equal(single, tmp_path):
    """Law 8: a stopped and resumed run ends with bit-equal weights."""
    model, _ = single
    settings = {"policy": "snapkv:0.5", "policy_tail": 4}
    assert_same_bits(*whole_and_resumed(model, 2, tmp_path, **settings))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("snapkv:0.25+int8", "stores entries exactly: rounding has no gradient"),
        ("snapkv:0.5+pages:0.5", "not what each query reads"),
        ("kvzip:0.5", "reads the text once"),
        ("full", "a policy that drops entries, or null"),
        ("snapkv+hold:0.5", "hold has no budget"),
        ("snapkv:0.5+hold", "a policy without hold"),
        ("snapvk:0.5", "did you mean 'snapkv'?"),
    ],
)
def test_a_policy_without_a_gradient_is_refused(policy, words):
    with pytest.raises(BadInput) as error:
        Training(policy=policy)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("tiny", ["train.policy=streaming:0.01"], "at least 5 entries; this is 1 of 128"),
        ("tiny", ["train.policy_tail=0"], "train.policy_tail"),
        ("tiny-gdn", ["train.policy=knorm:0.5"], "each layer has a window or a state"),
        ("tiny-concept", ["train.policy=knorm:0.5"], "only decoders"),
        ("tiny-hca", ["train.policy=knorm:0.5"], "one entry per"),
        ("tiny", ["train.policy=snapkv:x"], "a number behind the colon"),
    ],
)
def test_a_policy_that_does_not_fit_is_refused(preset, overrides, words):
    with pytest.raises(BadInput) as error:
        load(preset, overrides)
    assert words in str(error.value)
    assert "train.policy" in str(error.value)
