"""When entries are chosen: `hold`, `every`, and after each chunk of a prompt."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.cache import Policy
from mukv.cache.budget import CacheBudget
from mukv.cache.when import Every, Hold
from mukv.core.errors import BadInput
from mukv.infer.decode import decoding_weights, generate
from mukv.infer.sampling import Sampling
from mukv.model.counting import cache_bytes
from tests.laws import matrix
from tests.laws.matrix import EXACT
from tests.laws.test_policies import One, best_of, model_of, newest_stays, positions

CHUNK, TOKENS = 8, 32


@pytest.fixture(scope="module")
def one():
    return One()


def by_norm(one, row, head, places, number):
    key = one.key[row, head][places]
    best = best_of(newest_stays(-np.linalg.norm(key, axis=-1)), number)
    return [places[index] for index in best]


@pytest.mark.parametrize("name", ["hold", "every(tokens=4)", "folds"])
def test_entries_after_a_prompt(one, name):
    """`hold` keeps all that follows a prompt. `every` chooses in the shorter row only: 8 + 6 tokens
    are 4 more than a budget of 10, but 12 + 6 less than 4 more than one of 15."""
    body, later = one.body(f"knorm+{name}", 0.4, slots=20)
    for row, count in enumerate(one.count):
        newest = list(range(one.length, one.x.shape[1]))
        number = int((count + len(newest)) * 0.4)
        for head in range(2):
            kept = by_norm(one, row, head, list(range(count)), int(count * 0.4))
            assert positions(body, row, head) == kept
            places = [*kept, *newest]
            if name == "folds" or (name != "hold" and row == 1):
                places = by_norm(one, row, head, places, number)
            assert positions(later, row, head) == one.place[row][places].tolist()


def test_heads_that_share_a_pool_hold_all_that_follows(one):
    body, later = one.body("knorm+adaptive+hold", 0.4, slots=20)
    for row in range(2):
        held = {
            (int(owner), int(place))
            for each in (body, later)
            for owner, place in np.stack([each.shelf.owner[row, 0], each.shelf.position[row, 0]]).T
            if place >= 0
        }
        found = np.asarray(later.shelf.position)[row, 0] >= 0
        assert found.sum() == len(held) == 2 * (int(one.count[row] * 0.4) + 6)


@pytest.mark.parametrize("amount", [0.3, 1.0, 7.0, 90.0])
def test_room_is_enough_and_no_more(amount):
    """The room equals the most that a row holds over all lengths of prompts and questions."""
    budget = CacheBudget(amount)
    for length, most in ((40, 12), (40, 40), (64, 0)):
        whole, more = Hold().room(length, most)
        room = min(budget.of(whole) + more, length)
        held = max(
            budget.of(prompt) + after
            for after in range(most + 1)
            for prompt in range(length - after + 1)
        )
        assert room == held
    assert Hold().room(40, None) == (40, 40)
    assert Every(3).room(40, 5) == (40, 3)


def test_bytes_under_hold():
    """Law 4: there are slots for the budget of the prompt and for all tokens after it."""
    model = matrix.build("gqa", "rope", "plain")
    policy = Policy.parse("knorm:0.25+hold")
    room = 1, 64, 4, EXACT.type
    cache = model.empty_cache(*room, policy, after=16)
    for slot in cache.slots:
        assert slot.body.shelf.slots == 12 + 16
    assert cache.nbytes() == cache_bytes(model, *room, policy, 16)
    # What follows a prompt is not chosen from, so that its queries are not stored.
    asked = Policy.parse("tova:0.25+hold")
    assert model.empty_cache(*room, asked, after=16).nbytes() == cache.nbytes()


@pytest.mark.parametrize(
    "name", ["h2o:0.5+adaptive", pytest.param("snapkv:12", marks=pytest.mark.product)]
)
def test_chunks_are_steps_with_a_fold_after_each(name):
    """Law 2: a prompt read in chunks equals decoding steps with a fold after each chunk."""
    plan = "local-global" if name == "snapkv:12" else "plain"
    model, policy = matrix.build("gqa", "rope", plan), Policy.parse(name)
    ids, count = matrix.tokens(1, TOKENS), jnp.full(1, CHUNK)

    @jax.jit
    def run(weights, ids):
        empty = model.empty_cache(1, TOKENS, CHUNK, EXACT.type, policy)
        scores, first = model.prefill(weights, empty, ids[:, :CHUNK], count, compute=EXACT)
        chunks, steps, found = first, first, []
        for at in range(CHUNK, TOKENS, CHUNK):
            given = ids[:, at : at + CHUNK], count
            scores, chunks = model.prefill(weights, chunks, *given, fresh=False, compute=EXACT)

            def step(cache, token):
                scores, cache = model.step(weights, cache, token[None], compute=EXACT)
                return cache, scores

            steps, each = jax.lax.scan(step, steps, given[0][0])
            steps = model.fold(weights, steps)
            found.append((scores, each[-1]))
        return found, chunks, steps

    found, chunks, steps = run(model.unstack(matrix.weights(model)), ids)
    for chunk, step in found:
        np.testing.assert_allclose(chunk, step, atol=2e-5)
    for first, second in zip(chunks.slots, steps.slots, strict=True):
        if hasattr(first.body, "shelf"):
            np.testing.assert_array_equal(first.body.shelf.position, second.body.shelf.position)


@pytest.fixture(scope="module")
def continued():
    """Return a function that generates with a model of one layer."""
    model = model_of("gqa", "rope")
    weights = decoding_weights(model, matrix.weights(model), EXACT)

    def run(prompts, policy, **options):
        policy = Policy.parse(policy)
        given = {"compute": EXACT, "policy": policy, "sampling": Sampling()} | options
        return generate(model, weights, prompts, 68, **given)

    return run


IDS = np.random.default_rng(4).integers(3, matrix.VOCAB, (2, 150)).tolist()


@pytest.mark.product
def test_rows_with_fewer_chunks(continued):
    """The tokens of a row do not depend on another row that has more chunks."""
    prompts, then = [IDS[0], IDS[1][:30]], [IDS[1][:5], IDS[0][:20]]
    policy, options = "snapkv:24+hold", {"prefill_chunk": 64}
    both = continued(prompts, policy, then=then, **options)
    alone = continued(prompts[1:], policy, then=then[1:])
    assert both.tokens[1] == alone.tokens[0]
    whole = continued(prompts, "full", then=then)
    assert continued(prompts, "full", then=then, **options).tokens == whole.tokens
    assert both.cache_bytes < whole.cache_bytes


def test_bad_chunks(continued):
    with pytest.raises(BadInput, match="at least 1 token"):
        continued(IDS, "full", prefill_chunk=0)
