"""KVzip: scores from replaying a prompt, and a budget over all layers and heads."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.cache import Policy
from mukv.cache.layers import best_of_layers
from mukv.core.errors import BadInput
from mukv.core.tap import capture
from mukv.infer import replay
from mukv.infer.attention import attention_weights
from mukv.infer.decode import decoding_weights, generate
from mukv.infer.functions import decode_functions
from mukv.infer.prompts import readings
from mukv.infer.sampling import Sampling
from tests.laws import matrix
from tests.laws.matrix import EXACT
from tests.laws.test_policies import model_of

ASKS = ((7, 8), (9, 10, 11), (12,))
CHUNK = 64
PROMPTS = np.random.default_rng(5).integers(3, matrix.VOCAB, (2, 100)).tolist()
PROMPTS[1] = PROMPTS[1][:70]


@pytest.fixture(scope="module")
def model():
    return matrix.build("gqa", "rope", "plain")


@pytest.fixture(scope="module")
def weights(model):
    return decoding_weights(model, matrix.weights(model), EXACT)


def policy_of(name):
    policy = Policy.parse(name)
    return replace(policy, keep=replace(policy.keep, asks=ASKS))


@pytest.fixture(scope="module")
def kept(model, weights):
    """Return a function that returns the cache after the prompts."""
    return partial(cache_after, model, weights)


def cache_after(model, weights, name, prompts=PROMPTS):
    functions = decode_functions(model, Sampling(), EXACT)
    reads = readings(functions.prefill, functions.extend, prompts, None, None)
    given = policy_of(name), (len(prompts), 128, 16), 0, EXACT, jax.random.key(0)
    return replay.read_twice(model, weights, prompts, reads, *given)[1]


def factors(model, ids):
    """Compute |W v| [layer, head, token] and |h| [layer, token] from the input of each layer."""
    tree = model.unstack(model.scaled(matrix.weights(model)))
    with capture() as taps:
        model.hidden(model.scaled(matrix.weights(model)), jnp.asarray(ids), compute=EXACT)
    stream = model.embed(tree, jnp.asarray(ids), EXACT)
    place, found = jnp.arange(ids.shape[1])[None], []
    for layer, own in zip(model.stack.layers, tree["layers"], strict=True):
        entered = model.residual.enter(own, "attention", model.norm, stream)
        value = layer.attention.write(own["write"], entered, place)["value"]
        value = np.repeat(np.float64(value)[0], 2, axis=0)
        projected = np.einsum("htv,hve->hte", value, np.float64(own["read"]["output"]))
        sizes = np.linalg.norm(np.float64(entered)[0], axis=-1)
        found.append((np.linalg.norm(projected, axis=-1), sizes))
        stream = taps[f"layer{layer.index}.mlp"]
    return map(np.stack, zip(*found, strict=True))


@pytest.fixture(scope="module")
def scores(model):
    return dense_scores(model, PROMPTS, plus=False)


def dense_scores(model, prompts, plus):
    """Compute scores in numpy, by a dense pass over prompt and repetition: [row][layer, kv head,
    entry]."""
    found = []
    for prompt in prompts:
        length, parts = len(prompt), []
        for start in range(0, length, CHUNK):
            piece = prompt[start : start + CHUNK]
            asked = [*ASKS[1], *prompt[start - 8 : start]] if start else list(ASKS[0])
            told = [*asked, *ASKS[2], *piece]
            ids = np.array([[*prompt, *told]])
            dense = attention_weights(model, model.scaled(matrix.weights(model)), ids, EXACT)
            own = np.arange(length, ids.shape[1])
            keys = [*range(min(4, start)), *range(start, start + len(piece)), *own]
            part = np.stack([dense[layer][:, own][:, :, keys] for layer in sorted(dense)])
            part /= part.sum(-1, keepdims=True)
            if plus:
                projected, sizes = factors(model, ids)
                part *= projected[:, :, None, keys] / sizes[:, None, own, None]
            heads = model.attention.key_heads
            part = part.reshape(len(part), heads, -1, *part.shape[2:]).max((2, 3))
            parts.append(part[..., min(4, start) :][..., : len(piece)])
        found.append(np.concatenate(parts, -1))
    return found


def positions(cache, row):
    """Return the sets of kept (head, position), for each layer."""
    found = []
    for slot in cache.slots:
        shelf = slot.body.shelf
        heads = shelf.position.shape[1]
        if shelf.owner is None:
            pairs = [(h, p) for h in range(heads) for p in shelf.position[row, h].tolist()]
        else:
            pairs = zip(shelf.owner[row, 0].tolist(), shelf.position[row, 0].tolist(), strict=True)
        found.append({pair for pair in pairs if pair[1] >= 0})
    return found


def best(score, number):
    """Return the indices of the largest elements of an array, as a set."""
    flat = np.argsort(-score.ravel(), kind="stable")[:number]
    return {tuple(map(int, at)) for at in zip(*np.unravel_index(flat, score.shape), strict=True)}


@pytest.mark.product
@pytest.mark.parametrize("share", [0.5, 0.3])
def test_the_best_entries_of_all_layers_are_kept(kept, scores, share):
    """Kept entries are those with the best scores of a dense pass, over all layers and heads
    together."""
    cache = kept(f"kvzip(chunk={CHUNK}):{share}")
    for row, score in enumerate(scores):
        score = score.copy()
        score[..., :4] = score[..., -1:] = np.inf
        number = score.size - int(score.size * (1 - share) + 1e-9)
        found = {(n, *pair) for n, pairs in enumerate(positions(cache, row)) for pair in pairs}
        assert len(found) == number
        assert len(found ^ best(score, number)) <= 2  # equal to the last digit


@pytest.mark.product
def test_weights_times_norms(kept, model):
    """The entries that KVzip+ keeps are the best by weights times norms in a dense pass."""
    cache = kept(f"kvzip(chunk={CHUNK},plus=true):0.5", PROMPTS[1:])
    for row, score in enumerate(dense_scores(model, PROMPTS[1:], plus=True)):
        score[..., :4] = score[..., -1:] = np.inf
        found = {(n, *pair) for n, pairs in enumerate(positions(cache, row)) for pair in pairs}
        assert len(found ^ best(score, -(-score.size // 2))) <= 2


def test_a_budget_for_each_head_or_layer(kept, scores):
    by_head = kept(f"kvzip(chunk={CHUNK}):0.5+uniform")
    by_layer = kept(f"kvzip(chunk={CHUNK}):0.5+adaptive(floor=0)")
    for row, score in enumerate(scores):
        number = score.shape[-1] // 2
        score = score.copy()
        score[..., :4] = score[..., -1:] = np.inf
        for layer, each in enumerate(score):
            heads = {(h, p) for h, one in enumerate(each) for (p,) in best(one, number)}
            assert positions(by_head, row)[layer] == heads
            assert positions(by_layer, row)[layer] == best(each, 2 * number)


def test_layers_with_one_head_share_a_budget():
    model = matrix.build("mqa", "rope", "plain")
    weights = decoding_weights(model, matrix.weights(model), EXACT)
    cache = cache_after(model, weights, f"kvzip(chunk={CHUNK}):0.5", PROMPTS[:1])
    (score,) = dense_scores(model, PROMPTS[:1], plus=False)
    score[..., :4] = score[..., -1:] = np.inf
    found = {(n, *pair) for n, pairs in enumerate(positions(cache, 0)) for pair in pairs}
    assert len(found ^ best(score, -(-score.size // 2))) <= 2  # equal to the last digit


def test_entries_below_a_threshold_take_no_memory(kept, scores):
    """Of the best entries of all layers those that reach the threshold, and those of the window;
    pools have room for them alone."""
    prompts, score, number = PROMPTS[:1], scores[0].copy(), 300
    least = float(np.quantile(score, 0.6))
    share = f"{number / score.size:.3f}"
    name = f"kvzip(chunk={CHUNK}):{share}+threshold(least={least:.9f},window=7)"
    cache = kept(name, prompts)
    score[..., :4] = score[..., -7:] = np.inf
    expected = best(score, int((score >= least).sum()))
    found = {(n, *pair) for n, pairs in enumerate(positions(cache, 0)) for pair in pairs}
    assert len(found ^ expected) <= 2  # equal to the last digit
    assert len(found) < number
    sizes = [len(each) for each in positions(cache, 0)]
    assert [slot.body.shelf.slots for slot in cache.slots] == [-(-n // 16) * 16 for n in sizes]


@pytest.mark.product
def test_bytes_are_those_of_what_is_kept(kept, model):
    """The pool of a layer has room for its entries, rounded up to a multiple of 16."""
    prompts = PROMPTS[:1]
    cache = kept(f"kvzip(chunk={CHUNK}):0.25", prompts)
    sizes = [len(each) for each in positions(cache, 0)]
    assert [slot.body.shelf.slots for slot in cache.slots] == [-(-n // 16) * 16 for n in sizes]
    assert len(set(sizes)) > 1
    entries = sum(slot.body.shelf.stored["key"]["exact"].shape[2] for slot in cache.slots)
    assert entries < 0.25 * 4 * len(prompts[0]) + 16 * len(sizes) + 4


def test_ties_are_won_by_the_newer_entry_and_the_lower_layer():
    scores = [jnp.zeros((1, 2, 6))] * 2
    found, counts = best_of_layers(scores, jnp.array([5]), jnp.array([7]), 1, 0)
    held = np.isfinite(np.stack(found)[:, 0])
    assert np.asarray(counts)[:, 0].tolist() == [4, 3]
    assert not held[..., 5].any()
    assert held[..., 0].all()
    assert held[:, :, 4].tolist() == [[True, True], [True, False]]


@pytest.mark.product
def test_full_budget_is_full_attention():
    """Law 7: with full budget, tokens after a question and a fold equal those of the full cache."""
    model = model_of("gqa", "rope")
    weights = decoding_weights(model, matrix.weights(model), EXACT)
    given = {"compute": EXACT, "then": [PROMPTS[1][:5], PROMPTS[0][:9]]}
    whole = generate(model, weights, PROMPTS, 68, **given)
    found = generate(model, weights, PROMPTS, 68, policy=policy_of("kvzip(chunk=64)"), **given)
    assert found.tokens == whole.tokens


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("snapkv+layers", "those of kvzip, not snapkv"),
        ("kvzip+folds", "what follows the prompt has no scores"),
        ("kvzip+critical", "layers without critical"),
        ("kvzip", "which read a prompt twice"),
        ("kvzip+pages", "layers is read whole"),
    ],
)
def test_refused(model, name, words):
    with pytest.raises(BadInput) as error:
        model.empty_cache(1, 64, 4, EXACT.type, Policy.parse(name, 0.5))
    assert words in str(error.value)


def test_no_room_for_a_repetition(model, weights):
    short = replace(model, context=130)
    with pytest.raises(BadInput, match="its repetition"):
        generate(short, weights, PROMPTS, 4, compute=EXACT, policy=policy_of("kvzip:0.5"))
