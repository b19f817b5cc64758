"""Laws of learned eviction (DMS): gates, their training, and the cache policy that uses them."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention import Mask
from mukv.attention.eviction import EVICTED, EVICTION, Eviction
from mukv.attention.mixer import EntryStore
from mukv.cache import Policy
from mukv.compress.reader import capped_share
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.params import named, nested
from mukv.model import Stage
from mukv.model.counting import cache_bytes
from mukv.model.evicting import Evicting
from mukv.model.loss import Teacher, summed_loss
from mukv.model.passes import Asked
from mukv.runs.config import load
from mukv.storage.checkpoint import Checkpoints
from mukv.train.eviction import NOISE, TARGET, EvictionGates
from mukv.train.step import BATCH_FIELDS
from mukv.train.training import Training
from tests.laws import matrix
from tests.laws.matrix import EXACT
from tests.laws.test_resume import assert_same_bits
from tests.pairs import params
from tests.training import batch, run, steps, trainer

LENGTH, WINDOW, ROWS = 24, 5, 2
CHUNKED = Compute("float32", "float32", unroll=True, attention_chunk=4)
SCANNED = Compute("float32", "float32", unroll=False, rematerialise=True, attention_chunk=4)
GATES = EvictionGates(ratio=2.0, ramp=3)


def model_of(attention="gqa", position="rope", window=WINDOW):
    """Make a model of two equal layers with gates."""
    model = matrix.build(attention, position, "plain")
    own = replace(model.attention, eviction=Eviction(window))
    plain = replace(own, position=matrix.POSITIONS[position])
    return replace(model, attention=plain, plan=(Stage(repeats=2),))


def weights_of(model, size=0.03):
    """Draw weights whose gates evict some entries."""
    found = named(matrix.weights(model))
    random = np.random.default_rng(3)
    for name, leaf in found.items():
        if name.endswith(EVICTION):
            found[name] = (size * random.standard_normal(leaf.shape)).astype(np.float32)
    return jax.tree.map(jnp.asarray, nested(found))


def rows():
    return jnp.asarray(matrix.tokens(ROWS, LENGTH))


def read(model, weights, ids, through=None, compute=EXACT):
    """Compute the logits of whole rows."""

    @jax.jit
    def run(weights, ids):
        scaled = model.scaled(weights)
        result = model.forward(scaled, ids, compute=compute, through=through)
        return model.logits(scaled, result.hidden, compute)

    return run(weights, ids)


def decoded(model, weights, ids, policy, prompt, tail):
    """Return the logits after the prompt and after each further token, and the cache."""

    @jax.jit
    def run(weights, ids):
        apart = model.unstack(model.scaled(weights))
        cache = model.empty_cache(ROWS, LENGTH, tail, EXACT.type, policy)
        count = jnp.full(ROWS, prompt)
        first, cache = model.prefill(apart, cache, ids[:, :prompt], count, compute=EXACT)
        found = [first]
        for place in range(prompt, LENGTH):
            logits, cache = model.step(apart, cache, ids[:, place], compute=EXACT)
            found.append(logits)
            if (place + 1 - prompt) % tail == 0:
                cache = model.fold(apart, cache)
        return jnp.stack(found, axis=1), cache

    return run(weights, ids)


def held(cache):
    """Return the positions in each body, of each row and head."""
    found = []
    for slot in cache.slots:
        position, there = np.asarray(slot.body.shelf.position), slot.body.shelf.there()
        for row, used in zip(position, np.asarray(there), strict=True):
            heads = np.broadcast_to(row, used.shape)
            found.append([sorted(p[u].tolist()) for p, u in zip(heads, used, strict=True)])
    return found


CASES = [("gqa", "rope", "dms", 4), ("gqa", "rope", "dms+adaptive(floor=0)", 7)]
CASES += [("gqa-dressed", "rope-yarn", "dms", 7), ("mqa", "alibi", "dms", 2)]


@pytest.mark.parametrize("case", params(CASES, CASES[1:2], lambda case: "-".join(map(str, case))))
def test_prefill_and_steps_read_what_whole_rows_read(case):
    """Law 2 with gates, law 4, and the same entries however the tokens were read."""
    attention, position, name, tail = case
    model, policy, ids = model_of(attention, position), Policy.parse(name), rows()
    weights = weights_of(model)
    whole = read(model, weights, ids, Evicting())
    late, cache = decoded(model, weights, ids, policy, LENGTH, tail)
    early, grown = decoded(model, weights, ids, policy, LENGTH - 2 * tail, tail)
    np.testing.assert_allclose(late, whole[:, -1:], atol=3e-5)
    np.testing.assert_allclose(early, whole[:, -early.shape[1] :], atol=3e-5)
    assert held(cache) == held(grown)
    kept = [len(head) for row in held(cache) for head in row]
    assert min(kept) > WINDOW
    assert max(kept) < LENGTH
    assert len(set(kept)) > 1
    assert float(jnp.abs(whole - read(model, weights, ids)).max()) > 1e-2
    assert cache.nbytes() == cache_bytes(model, ROWS, LENGTH, tail, EXACT.type, policy)


@pytest.mark.product
@pytest.mark.parametrize("name", ["dms", "dms+adaptive(floor=0)"])
def test_chunks_of_a_prompt_read_what_whole_rows_read(name):
    """Rows of unequal length, in chunks longer than the window; law 2."""
    model, policy, ids = model_of(), Policy.parse(name), rows()
    weights, counts = weights_of(model), [jnp.array(each) for each in ([10, 7], [8, 9], [6, 2])]
    whole = read(model, weights, ids, Evicting())

    @jax.jit
    def run(weights):
        apart, found = model.unstack(model.scaled(weights)), []
        cache = model.empty_cache(ROWS, LENGTH, 4, EXACT.type, policy)
        for number, count in enumerate(counts):
            place = jnp.minimum(cache.length[:, None] + jnp.arange(10)[None], LENGTH - 1)
            now = jnp.take_along_axis(ids, place, axis=1)
            fresh = number == 0
            logits, cache = model.prefill(apart, cache, now, count, fresh, compute=EXACT)
            found.append((logits, cache.length))
        return found

    for logits, length in run(weights):
        expected = jnp.take_along_axis(whole, length[:, None, None] - 1, axis=1)[:, 0]
        np.testing.assert_allclose(logits, expected, atol=3e-5)


@pytest.mark.product
@pytest.mark.parametrize("name", [f"dms(window={LENGTH})", "dms(threshold=1e9)", "dms"])
def test_a_long_window_or_gates_that_evict_nothing_are_full_attention(name):
    """Law 7. Gates are zero at first, and evict nothing."""
    model, ids = model_of(), rows()
    weights = weights_of(model, 0.0 if name == "dms" else 0.03)
    found, cache = decoded(model, weights, ids, Policy.parse(name), 10, 7)
    np.testing.assert_allclose(found, read(model, weights, ids)[:, 9:], atol=3e-5)
    assert {len(head) for row in held(cache) for head in row} == {LENGTH}


def test_a_token_decides_about_no_entry_but_the_one_before_it():
    """Law 1: logits up to token t and decisions about entries before t ignore what follows."""
    model, ids, place = model_of(), rows(), 12
    weights = weights_of(model)
    other = ids.at[:, place:].add(1).__mod__(matrix.VOCAB)

    def run(ids):
        soft = Evicting(jnp.ones((ROWS, 2), jnp.uint32), jnp.ones(ROWS))
        return read(model, weights, ids, Evicting()), read(model, weights, ids, soft)

    for one, two in zip(run(ids), run(other), strict=True):
        np.testing.assert_array_equal(one[:, :place], two[:, :place])
        assert float(jnp.abs(one - two)[:, place:].max()) > 1e-2


@pytest.mark.product
def test_a_higher_threshold_keeps_more():
    model, ids = model_of(), rows()
    kept = []
    for threshold in (-8, 0, 8):
        policy = Policy.parse(f"dms(threshold={threshold})")
        cache = decoded(model, weights_of(model), ids, policy, LENGTH, 4)[1]
        kept.append([{*head} for head in held(cache)[0]])
    for fewer, more in itertools.pairwise(kept):
        assert all(a < b for a, b in zip(fewer, more, strict=True))


@pytest.mark.product
@pytest.mark.parametrize("name", ["dms:0.5", "dms:0.5+adaptive(floor=0)"])
def test_a_small_capacity_drops_the_likeliest_and_counts_them(name):
    model, policy, ids = model_of(), Policy.parse(name), rows()
    weights = weights_of(model)
    cache = decoded(model, weights, ids, policy, LENGTH, 4)[1]
    free = decoded(model, weights, ids, Policy.parse(name.replace(":0.5", "")), LENGTH, 4)[1]
    assert cache.nbytes() < 0.65 * free.nbytes()
    counts = [[sum(map(len, row)) for row in held(each)] for each in (cache, free)]
    assert max(counts[0]) <= LENGTH
    assert capped_share(free) == 0
    # In the first layer all entries are the same in both.
    lost = np.asarray(cache.slots[0].body.notes["capped"])
    np.testing.assert_array_equal(lost, np.subtract(counts[1], counts[0])[:ROWS])
    assert lost.sum() > 0
    assert (capped_share(cache) or 0) > 0


@pytest.mark.parametrize("compute", [matrix.PLAIN, CHUNKED], ids=["plain", "fused"])
def test_gradients_are_those_of_a_dense_pass_under_the_explicit_mask(compute):
    model, random = model_of("gqa-dressed"), np.random.default_rng(0)
    attention: Any = replace(model.attention, gate=None)
    write, own = attention.write_params(16), attention.read_params(16)
    draw = jax.tree.map(
        lambda p: jnp.asarray(random.standard_normal(p.shape) / 4, jnp.float32),
        (write, own),
        is_leaf=lambda leaf: hasattr(leaf, "dims"),
    )
    draw[0][EVICTION] = draw[0][EVICTION] / 4
    x = jnp.asarray(random.standard_normal((ROWS, LENGTH, 16)), jnp.float32)
    slope = jnp.asarray(random.standard_normal(x.shape), jnp.float32)
    position = jnp.tile(jnp.arange(LENGTH), (ROWS, 1))
    noise = jnp.asarray(random.integers(0, 1 << 32, (ROWS, 2)), jnp.uint32)
    through = Evicting(noise, jnp.ones(ROWS), 2.0)

    def bag(write, x):
        entries = EntryStore().entries(attention.write(write, x, position), position)
        layer = replace(model.layers[0], attention=attention)
        asked = Asked(attention, None, x, position)
        return through.limited(layer, entries, (0, 1), "", None, asked, None, 3)

    def mine(write, own, x):
        out = attention.read(own, x, position, [bag(write, x)], Mask(aligned=True), compute)[0]
        return jnp.sum(out * slope)

    def dense(write, own, x):
        """Compute softmax(softcap(q k) + mask) v with a mask of all pairs."""
        made = attention.write(write, x, position)
        draws = jax.vmap(
            lambda key: jax.random.logistic(
                jax.random.fold_in(jax.random.wrap_key_data(key), 3), (2, LENGTH)
            )
        )(noise)
        relaxed = (made[EVICTION][..., 0] + draws) / 2.0
        closing = jnp.roll(-jnp.log1p(jnp.exp(relaxed)), -1, axis=-1)
        far = position[0][:, None] - position[0][None] > WINDOW
        mask = jnp.where(far, closing[:, :, None], 0.0)
        mask = jnp.where(position[0][:, None] >= position[0][None], mask, -jnp.inf)
        query = attention.query(own, x, position)
        product = jnp.einsum("bhgqd,bhkd->bhgqk", query, made["key"]) * attention.scale
        logits = attention.softcap * jnp.tanh(product / attention.softcap) + mask[:, :, None]
        sinks = own["sinks"].reshape(1, 2, 2, 1, 1)
        weights = jnp.exp(logits) / (jnp.exp(logits).sum(-1, keepdims=True) + jnp.exp(sinks))
        heads = jnp.einsum("bhgqk,bhkd->bqhgd", weights, made["value"])
        heads = heads.reshape(ROWS, LENGTH, 4, 8)
        out = jnp.einsum("bqhd,hde->bqe", heads, own["output"]) + own["output_bias"][None, None]
        return jnp.sum(out * slope)

    given = (*draw, x)
    found, expected = (jax.jit(jax.grad(f, (0, 1, 2)))(*given) for f in (mine, dense))
    for name, gradient in named(expected).items():
        size = max(1.0, float(jnp.abs(gradient).max()))
        assert np.isfinite(named(found)[name]).all()
        np.testing.assert_allclose(
            named(found)[name] / size, gradient / size, atol=1e-5, err_msg=name
        )
    assert float(jnp.abs(found[0][EVICTION]).max()) > 1e-3


def drawn(step=1):
    """Return what the objective draws for the rows of a step."""
    found = GATES.drawn({"tokens": rows()}, Training(steps=8), jnp.asarray(step))
    return found[NOISE], found[TARGET]


@pytest.mark.product
def test_scanned_layers_draw_what_unrolled_ones_draw():
    model, ids = model_of(), rows()
    weights, through = weights_of(model), Evicting(*drawn(), 0.1)
    one, two = (read(model, weights, ids, through, compute) for compute in (EXACT, SCANNED))
    np.testing.assert_allclose(one, two, atol=3e-5)


@pytest.mark.product
def test_the_objective():
    """The divergence from the model without gates, and what is missing to the target, by row."""
    model, ids = model_of(), rows()
    weights, (noise, target) = model.scaled(weights_of(model)), drawn(0)
    np.testing.assert_allclose(target, 1 - 1 / (1 + 1 / 3))
    through = Evicting(noise, target)
    teacher = Teacher(model, weights, 1.0, 1.0)
    ones = jnp.ones(ids.shape)
    given = model, weights, ids, jnp.roll(ids, -1, 1), ones, None, None, EXACT, teacher
    losses, full = summed_loss(*given, through), summed_loss(*given)
    np.testing.assert_allclose(full.objective, 0, atol=1e-4)
    share = model.forward(weights, ids, compute=EXACT, through=through).counts[EVICTED] / LENGTH
    np.testing.assert_allclose(losses.counts[EVICTED], LENGTH * share.sum(), rtol=1e-6)
    missing = LENGTH * jnp.sum(jnp.maximum(target - share, 0))
    assert 0 < float(share.min()) < 1
    assert losses.divergence is not None
    assert float(losses.divergence) > 0
    np.testing.assert_allclose(losses.objective, losses.divergence + missing, rtol=1e-5)


def test_only_gates_are_trained():
    """The fraction of evicted entries rises, and all other weights stay as they are."""
    model = replace(model_of(window=2), plan=(Stage(),))
    train = trainer(model, adapter=GATES, learning_rate=3e-3)
    state, metrics = run(train, 3)
    assert all(name.endswith(EVICTION) for name in named(state.weights))
    assert np.isfinite([m.counts["divergence"] for m in metrics]).all()
    assert metrics[-1].counts[EVICTED] > metrics[0].counts[EVICTED]
    before, after = named(train.frozen), GATES.merged(model, train.frozen, state.weights)
    changed = {name for name, leaf in named(after).items() if jnp.any(leaf != before[name])}
    assert changed == {*named(state.weights)}


@pytest.mark.product
def test_pieces_of_a_batch_draw_what_the_batch_draws():
    model, found = model_of(window=2), []
    for accumulate in (1, 2):
        train = trainer(model, adapter=GATES, accumulate=accumulate, learning_rate=3e-3)
        found.append(run(train, 3)[0].weights)
    for one, two in zip(*map(jax.tree.leaves, found), strict=True):
        assert float(jnp.abs(one).max()) > 1e-3
        np.testing.assert_allclose(one, two, atol=1e-5)


@pytest.mark.product
@pytest.mark.parametrize("mesh", [{"data": 4}, {"data": 2, "tensor": 2}, {"context": 2}])
def test_sharding_is_invisible(mesh):
    """Law 6."""
    model = model_of(window=2)
    settings = {"adapter": GATES, "learning_rate": 3e-3}
    one, two = (run(trainer(model, **each, **settings), 2)[0] for each in ({}, mesh))
    for a, b in zip(*(jax.tree.leaves(jax.device_get(x.weights)) for x in (one, two)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.mark.product
def test_resume_is_bit_equal(tmp_path):
    """Law 8."""
    model = model_of(window=2)
    whole = run(trainer(model, adapter=GATES), 4)[0]
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, run(trainer(model, adapter=GATES), 2)[0])
        fresh = trainer(model, adapter=GATES)
        fresh.initial_state()  # draws the frozen weights
        state = checkpoints.restore(None, fresh.abstract_state())
    resumed = steps(fresh, state, 2, 4)[0]
    assert_same_bits(whole, resumed)
    assert float(jnp.abs(jax.tree.leaves(whole.weights)[0]).max()) > 0


@pytest.mark.product
def test_validation_evicts_without_noise():
    model = model_of(window=2)
    train = trainer(model, adapter=GATES, learning_rate=3e-3)
    state, _ = steps(train, train.initial_state(), 0, 6)
    with jax.set_mesh(train.mesh):
        given, table = train.put(batch(9)), jnp.ones(matrix.VOCAB, jnp.int32)
        found = [float(train.validate(state.weights, given, table)[0]) for _ in range(2)]
    whole = GATES.attached(model, train.frozen, state.weights)
    given: Any = [jnp.asarray(getattr(batch(9), name)) for name in BATCH_FIELDS]
    expected = summed_loss(model, whole, *given, compute=EXACT, through=Evicting())
    np.testing.assert_allclose(found, float(expected.cross_entropy), rtol=1e-5)


@pytest.mark.parametrize(
    ("preset", "overrides", "words"),
    [
        ("tiny", [], "gates in every layer without a window"),
        ("tiny", ["model.attention.eviction.window=256"], "less than the 128 tokens of a row"),
        ("tiny-mla", [], "layer 0 (latent) has none; grouped attention has them"),
        ("tiny-gdn", [], "without a window"),
        ("tiny-concept", [], "decoder, for train.adapter"),
        ("tiny", ["model.attention.eviction.window=0"], "model.attention.eviction.window"),
        ("tiny", ["train.adapter.ratio=1"], "greater than 1: all entries"),
        ("tiny", ["train.adapter.temperature=0"], "train.adapter.temperature"),
        ("tiny", ["model.attention.eviction.window=8", "train.policy=knorm:0.5"], "evict already"),
    ],
)
def test_what_does_not_fit_is_refused(preset, overrides, words):
    with pytest.raises(BadInput) as error:
        load(preset, ["train.adapter.kind=eviction", *overrides])
    assert words in str(error.value)


def test_a_policy_that_does_not_fit_is_refused():
    for model, name, words in (
        (matrix.build("gqa", "rope", "plain"), "dms", "has none; train.adapter of kind eviction"),
        (matrix.build("latent", "rope", "plain"), "dms", r"layer 0 \(latent\) has none"),
        (model_of(), "dms+pages", "dms without a part that chooses what is read"),
        (model_of(), "dms+every", "dms without every"),
    ):
        with pytest.raises(BadInput, match=words):
            model.empty_cache(1, LENGTH, 4, EXACT.type, Policy.parse(name))
    with pytest.raises(BadInput, match=r"train\.adapter trains"):
        Training(policy="dms:0.5")
    with pytest.raises(BadInput, match="threshold"):
        Policy.parse("dms(threshold=nan)")
