"""DSA: latent attention of which an indexer chooses the entries."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import CSA, EntryStore, Indexer, Latent, Mask
from mukv.cache import Policy
from mukv.cache.reads import bytes_read
from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.model import LanguageModel, Layer, Stage
from mukv.model.loss import summed_loss
from mukv.model.policy_check import check_policy
from mukv.position import CoPE
from tests.laws import matrix
from tests.laws.matrix import EXACT, LENGTH, OTHER, PLAIN


def of(top_k, attention="latent-indexed"):
    """Return a model of one layer whose queries read `top_k` entries."""
    model = dataclasses.replace(matrix.build(attention, "rope", "plain"), plan=(Stage(),))
    chosen = model.attention
    indexer = dataclasses.replace(chosen.indexer, top_k=top_k) if top_k else None
    return dataclasses.replace(model, attention=dataclasses.replace(chosen, indexer=indexer))


def without_index(tree):
    """Return weights without those of the indexer."""
    if not isinstance(tree, dict):
        return tree
    return {name: without_index(each) for name, each in tree.items() if name != "index"}


def logits(model, weights, ids, compute=EXACT):
    place = np.tile(np.arange(LENGTH), (len(ids), 1))
    return matrix.logits(model, compute)(weights, ids, place, np.zeros_like(ids))


def test_with_all_entries_it_is_latent_attention():
    """Law 7: a choice of as many entries as there are is none, and one of fewer changes logits."""
    ids, weights = matrix.tokens(2), matrix.weights(of(3))
    whole = logits(of(0), without_index(weights), ids)
    np.testing.assert_array_equal(logits(of(LENGTH), weights, ids), whole)
    assert np.abs(logits(of(3), weights, ids) - whole).max() > 1e-3


def test_a_layer_reads_what_another_chooses():
    """Law 10: with equal indexers and inputs, a layer that reads by the choice of another reads
    what it would choose itself."""
    model = dataclasses.replace(of(3), plan=(Stage((Layer(), Layer(indexed_by=-1))),))
    own, shared = (layer.attention for layer in model.layers)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, LENGTH, 16)), jnp.float32)
    place = jnp.tile(jnp.arange(LENGTH), (2, 1))
    write, read = matrix.drawn(own.write_params(16)), matrix.drawn(own.read_params(16), 1)

    @partial(jax.jit, static_argnums=1)
    def both(x, aligned):
        mask = Mask(aligned=aligned)
        given = x, place, [EntryStore().entries(own.write(write, x, place), place)]
        chosen = own.choose(read, *given, mask, EXACT)
        theirs = dataclasses.replace(mask, choice=chosen)
        reads = (own, read, mask), (shared, without_index(read), theirs)
        return [each.read(tree, *given, of, EXACT)[0] for each, tree, of in reads]

    for aligned in (True, False):
        np.testing.assert_allclose(*both(x, aligned), atol=1e-6)


SHARED = (Layer(), Layer(indexed_by=-1))
ROUNDING = 2e-4
"""What logits of eight layers change if weights are off by one unit in the last place: 1.4e-4."""


def test_choices_pass_through_scans_and_decoding():
    """Scanned repeats, which read by a choice of their own or of an earlier stage, equal unrolled
    ones; decoding (law 2) equals training."""
    plan = (Stage(SHARED), Stage((*SHARED, Layer(indexed_by=0)), repeats=2))
    model, count = dataclasses.replace(of(3), plan=plan), np.array([5, 7])
    ids, weights = matrix.tokens(2), matrix.weights(model)
    whole, rows = logits(model, weights, ids), model.unstack(weights)
    np.testing.assert_allclose(logits(model, weights, ids, OTHER), whole, atol=ROUNDING)
    cache = model.empty_cache(2, LENGTH, 4, EXACT.type)
    prefill = jax.jit(partial(model.prefill, compute=EXACT))
    found, cache = prefill(rows, cache, ids[:, :7], jnp.asarray(count))
    step = jax.jit(partial(model.step, compute=EXACT))
    for _ in range(4):
        np.testing.assert_allclose(found, whole[[0, 1], count - 1], atol=ROUNDING)
        found, cache = step(rows, cache, ids[[0, 1], count])
        count += 1


def test_policies_under_which_layers_hold_other_entries_are_refused():
    model = dataclasses.replace(of(3), plan=(Stage(SHARED),))
    for name, fits in (("int8", True), ("snapkv", False), ("pages", False)):
        policy = Policy.parse(name, 0.5)
        with (
            nullcontext() if fits else pytest.raises(BadInput, match="layer 1 reads by the choice")
        ):
            check_policy(model.stack, policy)


def test_a_choice_within_a_window_beside_a_policy():
    """Law 2: if a policy chooses what each query reads in another layer, a block equals its
    steps."""
    near = tuple(dataclasses.replace(layer, window=6) for layer in SHARED)
    plain = Layer(attention=matrix.build("gqa", "rope", "plain").attention)
    model = dataclasses.replace(of(3), plan=(Stage((plain, *near)),))
    policy, ids = Policy.parse("topk", 0.5), jnp.asarray(matrix.tokens(2))
    check_policy(model.stack, policy)
    weights = model.unstack(matrix.weights(model))
    cache = model.empty_cache(2, LENGTH, 4, EXACT.type, policy)
    _, cache = model.prefill(weights, cache, ids[:, :8], jnp.array([8, 7]), compute=EXACT)
    found, _ = model.read_block(weights, cache, ids[:, 8:], EXACT)
    expected, _ = LanguageModel.read_block(model, weights, cache, ids[:, 8:], EXACT)
    np.testing.assert_allclose(found, expected, atol=2e-5)


def test_the_indexer_learns_from_its_loss_alone():
    model, ids = of(3), jnp.asarray(matrix.tokens(2))
    weights = matrix.weights(model)

    def language(weights):
        ones = jnp.ones(ids.shape)
        return summed_loss(
            model, weights, ids, jnp.roll(ids, -1, 1), ones, compute=PLAIN
        ).cross_entropy

    def penalty(weights):
        place = jnp.tile(jnp.arange(LENGTH), (2, 1))
        result = model.forward(weights, ids, place, jnp.ones_like(place), PLAIN)
        return jnp.sum(result.penalty)

    for loss, learns in ((language, False), (penalty, True)):
        for name, gradient in named(jax.jit(jax.grad(loss))(weights)).items():
            assert (np.abs(gradient).max() > 0) == ((".index." in name) == learns), name


@pytest.mark.parametrize("attention", ["latent-indexed", "csa"])
def test_a_step_reads_the_chosen_entries_and_the_keys_of_the_indexer(attention):
    """Law 7: of a long body a step reads the chosen entries, and the indexer's keys of all."""
    model, length, top_k = of(3, attention), 400, 3
    cache = jax.eval_shape(lambda: model.empty_cache(1, length, 8, EXACT.type))
    weights = jax.eval_shape(model.unstack, matrix.weights(model))

    body = cache.slots[-1].body.tensors
    others = {name: each for name, each in body.items() if name != "index"}
    width = sum(each.shape[-1] for each in others.values())

    def of_body(tensors, cache, weights):
        slot = cache.slots[-1]
        slot = dataclasses.replace(slot, body=dataclasses.replace(slot.body, tensors=tensors))
        cache = dataclasses.replace(cache, slots=(*cache.slots[:-1], slot))
        token = jnp.zeros(1, jnp.int32)
        return model.step(weights, cache, token, compute=EXACT)[0]

    read = bytes_read(of_body, body, cache, weights)
    assert read == 4 * (top_k * width + body["index"].size)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Latent(indexer=Indexer()), "query_rank: got None"),
        (lambda: Latent(query_rank=4, indexer=Indexer(width=8)), "indexer.width: got 8"),
        (lambda: Latent(query_rank=4, indexer=Indexer(), position=CoPE()), "position: got 'cope'"),
        (lambda: Indexer(top_k=0), "top_k: got 0"),
        (lambda: CSA(indexer=Indexer(width=8)), "indexer.width: got 8"),
    ],
)
def test_refused(make, words):
    with pytest.raises(BadInput, match=words):
        make()
