"""The gated delta rule: its recurrence in numpy, equivalences, initial decays, and refusals."""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.attention.delta_rule import DeltaRows, delta_rule, unit_lower_inverse
from mukv.attention.gated_delta import GatedDelta
from mukv.attention.kimi_delta import KimiDelta
from mukv.cache import Policy
from mukv.core import params
from mukv.core.errors import BadInput
from mukv.model import Decoder, Layer, Stage
from mukv.position import RoPE
from tests.laws import matrix
from tests.laws.matrix import EXACT, LENGTH

BATCH, TOKENS, HEADS, KEY, VALUE = 2, 75, 3, 8, 6
CHUNKS = (1, 4, 64, 128)


def drawn(decay_dim: int, seed: int = 0) -> tuple[DeltaRows, np.ndarray]:
    """Draw random rows in float64, with keys of unit length, and an initial state."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return random.standard_normal((BATCH, *shape))

    query, key = normal(TOKENS, HEADS, KEY), normal(TOKENS, HEADS, KEY)
    key /= np.linalg.norm(key, axis=-1, keepdims=True)
    value, decay = normal(TOKENS, HEADS, VALUE), -np.exp(normal(TOKENS, HEADS, decay_dim))
    beta = 2 / (1 + np.exp(-normal(TOKENS, HEADS)))
    return DeltaRows(query, key, value, decay, beta), normal(HEADS, KEY, VALUE)


def recurrence(
    rows: DeltaRows, first: np.ndarray, state: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the delta rule by its definition, token by token."""
    query, key, value, decay, beta = (np.asarray(each) for each in rows)
    found = []
    for t in range(query.shape[1]):
        state = np.where(first[:, t, None, None, None], 0, state)
        state = np.exp(decay[:, t])[..., None] * state
        missing = value[:, t] - np.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + key[:, t, :, :, None] * (beta[:, t, :, None] * missing)[:, :, None]
        found.append(np.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return np.stack(found, 1), state


def borders() -> np.ndarray:
    """Return where documents begin, bool [batch token]; one document has one token, and row 1
    begins within a document."""
    first = np.zeros((BATCH, TOKENS), bool)
    first[0, [0, 10, 11, 40]] = first[1, 37] = True
    return first


@partial(jax.jit, static_argnames=("chunk", "part"))
def computed(rows, first, state, chunk, part=128):
    return delta_rule(jax.tree.map(jnp.float32, rows), first, jnp.float32(state), chunk, part)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("decay_dim", [1, KEY])
def test_chunks_of_any_size_are_the_recurrence(decay_dim, chunk):
    """Chunks of any size equal the recurrence, with decays per head or per channel, several
    documents in a row and an initial state."""
    rows, state = drawn(decay_dim)
    read, after = recurrence(rows, borders(), state)
    found, kept = computed(rows, borders(), state, chunk)
    np.testing.assert_allclose(found, read, atol=2e-5)
    np.testing.assert_allclose(kept, after, atol=1e-5)


def test_parts_of_any_size_are_the_recurrence():
    """Parts of several chunks, of which the last is padded, equal the recurrence."""
    rows, state = drawn(1)
    read, after = recurrence(rows, borders(), state)
    for part in (8, 32):
        found, kept = computed(rows, borders(), state, 8, part)
        np.testing.assert_allclose(found, read, atol=2e-5)
        np.testing.assert_allclose(kept, after, atol=1e-5)


@pytest.mark.product
@pytest.mark.parametrize("decay_dim", [1, KEY])
def test_its_gradient_is_that_of_the_recurrence(decay_dim):
    rows, state = jax.tree.map(jnp.float32, drawn(decay_dim))
    first = jnp.asarray(borders())
    mixed = np.random.default_rng(1).standard_normal((BATCH, TOKENS, HEADS, VALUE))

    def scanned(rows, state):
        def step(state, given):
            (query, key, value, decay, beta), begins = given
            state = jnp.where(begins[:, None, None, None], 0, state) * jnp.exp(decay)[..., None]
            missing = value - jnp.einsum("bhkv,bhk->bhv", state, key)
            state = state + key[..., None] * (beta[..., None] * missing)[:, :, None]
            return state, jnp.einsum("bhkv,bhk->bhv", state, query)

        by_token = jax.tree.map(lambda array: array.swapaxes(0, 1), (rows, first))
        state, read = jax.lax.scan(step, state, by_token)
        return jnp.sum(read.swapaxes(0, 1) * mixed) + jnp.sum(state)

    def chunked(rows, state):
        read, state = delta_rule(rows, first, state, 16, 32)
        return jnp.sum(read * mixed) + jnp.sum(state)

    expected = jax.jit(jax.grad(scanned, (0, 1)))(rows, state)
    found = jax.jit(jax.grad(chunked, (0, 1)))(rows, state)
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-4 * float(np.abs(two).max()))


@pytest.mark.product
def test_strong_decays_do_not_overflow():
    """Sums of log decays are far below -88, where exp(-G) overflows in float32."""
    rows, state = drawn(KEY)
    rows = rows._replace(decay=5 * rows.decay)
    read, after = recurrence(rows, borders(), state)
    found, kept = computed(rows, borders(), state, 64)
    np.testing.assert_allclose(found, read, atol=2e-5)
    np.testing.assert_allclose(kept, after, atol=1e-5)
    gradient = jax.grad(lambda rows: jnp.sum(computed(rows, borders(), state, 64)[0]))(
        jax.tree.map(jnp.float32, rows)
    )
    assert all(np.isfinite(leaf).all() for leaf in gradient)


def test_equal_decays_of_all_channels_are_one_decay():
    rows, state = drawn(1)
    wide = rows._replace(decay=np.repeat(rows.decay, KEY, axis=-1))
    for one, two in zip(
        *(computed(each, borders(), state, 64) for each in (rows, wide)), strict=True
    ):
        np.testing.assert_allclose(one, two, atol=2e-5)


def test_without_decay_and_beta_the_state_stays():
    rows, state = drawn(1)
    still = rows._replace(decay=0 * rows.decay, beta=0 * rows.beta)
    nothing = np.zeros((BATCH, TOKENS), bool)
    read, after = computed(still, nothing, state, 16)
    np.testing.assert_array_equal(after, jnp.float32(state))
    expected = np.einsum("bthk,bhkv->bthv", rows.query, state)
    np.testing.assert_allclose(read, expected, atol=1e-5)


def test_without_a_carried_state_a_token_reads_itself():
    rows, state = drawn(1)
    alone = rows._replace(decay=0 * rows.decay - 1e4, beta=0 * rows.beta + 1)
    expected = np.sum(rows.query * rows.key, axis=-1, keepdims=True) * rows.value
    nothing = np.zeros((BATCH, TOKENS), bool)
    np.testing.assert_allclose(computed(alone, nothing, state, 16)[0], expected, atol=1e-5)


def test_with_orthonormal_keys_it_is_linear_attention():
    rows, state = drawn(1)
    rows = DeltaRows(*(np.asarray(each)[:, :KEY] for each in rows))
    keys = np.broadcast_to(np.eye(KEY)[None, :, None], rows.key.shape)
    plain = rows._replace(key=keys, decay=0 * rows.decay, beta=0 * rows.beta + 1)
    seen = np.einsum("bqhd,bkhd->bhqk", rows.query, keys) * np.tri(KEY)
    expected = np.einsum("bhqk,bkhv->bqhv", seen, rows.value)
    nothing = np.zeros((BATCH, KEY), bool)
    np.testing.assert_allclose(computed(plain, nothing, 0 * state, 4)[0], expected, atol=1e-5)


@pytest.mark.product
@pytest.mark.parametrize("size", [1, 2, 16])
def test_the_inverse_and_its_gradient(size):
    lower = np.tril(np.random.default_rng(0).standard_normal((3, size, size)), -1)
    given = jnp.float32(lower)
    expected = np.linalg.inv(np.eye(size) + lower)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(unit_lower_inverse(given), expected, atol=1e-5 * scale)
    other = jnp.float32(np.random.default_rng(1).standard_normal(lower.shape))
    exact = jax.grad(lambda a: jnp.sum(jnp.linalg.inv(jnp.eye(size)[None] + a) * other))(given)
    found = jax.grad(lambda a: jnp.sum(unit_lower_inverse(a) * other))(given)
    np.testing.assert_allclose(np.tril(found, -1), np.tril(exact, -1), atol=2e-5 * scale**2)


def test_initial_states_decay_within_one_to_a_thousand_tokens():
    """Initial decay rates are in [1, 16], initial steps in [0.001, 0.1], so that states decay
    within about 1 to 1000 tokens."""
    model = Decoder(d_model=16, attention=GatedDelta(heads=512, head_dim=1), plan=(Stage(),))
    own = model.init()["stage0"]["slot0"]["write"]
    rate, step = np.exp(own["rate"]), np.log1p(np.exp(own["step"]))
    assert rate.min() >= 1
    assert rate.max() <= 16
    assert step.min() > 0.9e-3
    assert step.max() < 0.11
    lasts = 1 / (rate * step)
    assert 0.6 < lasts.min() < 2
    assert 200 < lasts.max() < 1100


def test_filters_begin_at_one_over_the_root_of_their_taps():
    model = Decoder(d_model=16, attention=GatedDelta(heads=8, head_dim=32), plan=(Stage(),))
    taps = model.init()["stage0"]["slot0"]["write"]["convolution"]["key"]
    assert 0.45 < float(np.std(taps)) < 0.55


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ((Layer(window=4),), "window 4.*gated_delta in layer 0 has a state and no entries"),
        ((Layer(position=RoPE()),), "position rope.*layer 0 takes no position encoding"),
        ((Layer(), Layer(reads=-1)), "reads 0 in layer 1.*gated_delta in layer 0 has a state"),
        (
            (Layer(attention=matrix.ATTENTIONS["gqa"]), Layer(reads=-1)),
            "reads 0 in layer 1.*gated_delta in layer 1 has a state",
        ),
    ],
)
def test_a_plan_that_asks_for_entries_is_refused(layers, says):
    with pytest.raises(BadInput, match=says):
        Decoder(d_model=16, attention=matrix.ATTENTIONS["gated-delta"], plan=(Stage(layers),))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"key_heads": 3}, "key_heads: got 3; a number that divides heads"),
        ({"taps": 0}, "taps: got 0; at least 1 token"),
        ({"head_dim": 0}, "head_dim"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, says):
    with pytest.raises(BadInput, match=says):
        GatedDelta(**fields)


def test_a_floor_that_is_no_decay_is_refused():
    with pytest.raises(BadInput, match=r"decay_floor: got 0\.0; less than 0"):
        KimiDelta(decay_floor=0.0)


@pytest.mark.product
def test_a_floor_bounds_the_decays():
    """With a floor, every log decay is between the floor and 0; without one some are lower."""
    x = 30 * jnp.asarray(np.random.default_rng(0).standard_normal((1, 20, 16)), jnp.float32)
    for floor in (None, -5.0):
        layer = KimiDelta(heads=2, head_dim=4, decay_floor=floor)
        model = Decoder(d_model=16, attention=layer, plan=(Stage(),))
        own = jax.tree.map(lambda leaf: leaf[0], model.init()["stage0"]["slot0"]["write"])
        decay = np.asarray(layer.decay(own, x))
        assert decay.max() <= 0
        assert (decay.min() < -5) == (floor is None)


def test_a_policy_refuses_states_by_name():
    model = matrix.build("gated-delta", "rope", "plain")
    with pytest.raises(BadInput, match=r"a state \(memory, recent\)"):
        model.empty_cache(1, 8, policy=Policy.parse("snapkv:0.5"))


@pytest.mark.product
def test_in_a_hybrid_a_policy_acts_on_the_attention_alone():
    """In a model of delta and attention layers, a policy with full budget gives the logits of no
    policy; with less budget the cache is smaller."""
    model = matrix.build("gated-delta", "rope", "plain")
    gqa = dataclasses.replace(matrix.ATTENTIONS["gqa"], position=RoPE())
    model = dataclasses.replace(model, plan=(Stage((Layer(), Layer(attention=gqa))),))
    weights, ids = model.unstack(matrix.weights(model)), jnp.asarray(matrix.tokens())

    def cache(name):
        return model.empty_cache(2, LENGTH, 2, EXACT.type, policy=Policy.parse(name))

    @jax.jit
    def decode(cache):
        _, cache = model.prefill(weights, cache, ids[:, :7], jnp.array([7, 5]), compute=EXACT)
        return model.step(weights, cache, ids[:, 7], compute=EXACT)[0]

    found, expected = decode(cache("streaming:1.0")), decode(cache("full"))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert cache("streaming:0.5").nbytes() < cache("full").nbytes()


@pytest.mark.product
def test_local_layers_of_a_concept_model_may_have_states():
    """Decoding token by token equals the whole row, with delta layers around the concepts, and as
    global layers."""
    delta = matrix.ATTENTIONS["gated-delta"]
    local = (Stage((Layer(attention=delta),)),)
    model = matrix.concept("fixed", "weighted", "prefix", encoder=local, decoder=local)
    concepts = dataclasses.replace(model.concepts, plan=(Stage((Layer(attention=delta),)),))
    model = dataclasses.replace(model, concepts=concepts)
    tree, ids = matrix.weights(model), matrix.tokens(2)
    whole = matrix.logits(model)(tree, ids, None, None)
    weights = model.unstack(tree)
    step = jax.jit(partial(model.step, compute=EXACT))
    cache = model.empty_cache(2, LENGTH, LENGTH, EXACT.type)
    count = jnp.array([5, 3])
    found, cache = jax.jit(partial(model.prefill, compute=EXACT))(weights, cache, ids[:, :5], count)
    for _ in range(LENGTH - 5):
        np.testing.assert_allclose(found, whole[jnp.arange(2), count - 1], atol=2e-5)
        found, cache = step(weights, cache, ids[np.arange(2), count])
        count = count + 1


def test_states_are_constant():
    model = matrix.build("gated-delta", "rope", "plain")
    sizes = {model.empty_cache(1, length, 4, EXACT.type).nbytes() for length in (8, 800)}
    state, recent = 4 * 8 * 6, 2 * (2 * 2 * 8 + 4 * 6)
    assert sizes == {2 * 4 * (state + recent) + 4 * 2}
    assert params.count(model.params()) > 0
