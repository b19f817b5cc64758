"""Decoding equals the full forward pass, for any batch."""

from __future__ import annotations

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.infer.decode import TAIL, Sizes, decoding_weights, generate
from mukv.infer.functions import BLOCK
from mukv.infer.sampling import Sampling
from mukv.model.counting import cache_bytes
from tests.laws import matrix
from tests.laws.matrix import EXACT, VOCAB

PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3], [5]]
LONG = TAIL + 2 * BLOCK + 3
"""Number of new tokens, which folds a tail and ends within a block."""


@pytest.fixture(scope="module")
def model():
    return matrix.build("gqa", "rope", "local-global")


@pytest.fixture(scope="module")
def weights(model):
    return decoding_weights(model, matrix.weights(model), EXACT)


def test_weights_of_layers_share_the_memory_of_the_stack(model):
    stacked = jax.device_put(matrix.weights(model))
    layers = decoding_weights(model, stacked, EXACT)["layers"]
    for layer, own in zip(model.layers, layers, strict=True):
        whole = stacked[f"stage{layer.stage}"][f"slot{layer.slot}"]["mlp"]["up"]
        one = np.asarray(own["mlp"]["up"])
        assert np.array_equal(one, whole[layer.repeat])
        # JAX copies an array that does not begin at a multiple of 64 bytes.
        shared = np.shares_memory(one, np.asarray(whole))
        assert shared or one.nbytes % 64
    shapes = jax.eval_shape(lambda weights: decoding_weights(model, weights, EXACT), stacked)
    assert jax.tree.map(np.shape, shapes["layers"]) == jax.tree.map(np.shape, layers)


@pytest.fixture(scope="module")
def continued(model, weights):
    """Return a function that generates, with a default for each argument."""

    def run(prompts=PROMPTS, max_tokens=BLOCK, sampling=None, stop=(), show=None):
        return generate(model, weights, prompts, max_tokens, sampling, stop, EXACT, show)

    return run


def test_greedy_is_the_argmax_of_the_full_pass(model, continued):
    forward, tree = matrix.logits(model), matrix.weights(model)
    size = LONG + max(map(len, PROMPTS))
    ids = np.zeros((len(PROMPTS), size), np.int32)
    count = np.array([len(prompt) for prompt in PROMPTS])
    for row, prompt in zip(ids, PROMPTS, strict=True):
        row[: len(prompt)] = prompt
    rows, place = np.arange(len(ids)), np.tile(np.arange(size), (len(ids), 1))
    for step in range(LONG):
        scores = forward(tree, ids, place, np.zeros_like(ids))
        ids[rows, count + step] = np.argmax(scores, axis=-1)[rows, count + step - 1]
    made = continued(max_tokens=LONG).tokens
    assert made == [
        row[start : start + LONG].tolist() for row, start in zip(ids, count, strict=True)
    ]
    assert len(set(made[0])) > 3


@pytest.mark.product
def test_a_model_trained_with_rematerialisation_decodes(model, weights):
    sparing = replace(EXACT, rematerialise=True)
    made = [generate(model, weights, PROMPTS, 4, compute=each).tokens for each in (EXACT, sparing)]
    assert made[0] == made[1]


@pytest.mark.product
@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1e-6)]
)
def test_sampling_from_one_token_is_greedy(continued, sampling):
    assert continued(sampling=sampling).tokens == continued().tokens


@pytest.mark.product
def test_a_prompt_may_be_read_in_two_parts(model, weights, continued):
    prompts = [[7, 8, 9, 2, 6] * 15, [1, 5, 9, 2]]
    then = [[4, 4, 1], [2, 7, 1, 8, 2, 8]]
    whole = [[*one, *two] for one, two in zip(prompts, then, strict=True)]
    made = generate(model, weights, prompts, BLOCK, compute=EXACT, then=then)
    assert made.tokens == continued(whole).tokens
    with pytest.raises(BadInput, match="as many rows as prompts"):
        generate(model, weights, prompts, BLOCK, compute=EXACT, then=[[1], []])


@pytest.mark.product
def test_a_row_does_not_depend_on_its_batch(continued):
    together = continued(max_tokens=LONG).tokens
    assert [continued([prompt], LONG).tokens[0] for prompt in PROMPTS] == together
    hot = Sampling(1.5, seed=3)
    assert continued(PROMPTS[:1], sampling=hot).tokens == continued(sampling=hot).tokens[:1]


@pytest.mark.product
def test_rows_and_seeds_draw_independently(continued):
    made = [continued([[1, 2]] * 3, sampling=Sampling(1.0, seed=seed)).tokens for seed in (0, 1)]
    assert len({tuple(row) for rows in made for row in rows}) == 6


def test_stop_ends_a_row_with_itself(continued):
    whole = continued(max_tokens=LONG).tokens
    stop = whole[0][4]
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in whole]
    assert continued(max_tokens=LONG, stop={stop}).tokens == expected
    everything = continued(max_tokens=LONG, stop=range(VOCAB))
    assert [len(row) for row in everything.tokens] == [1, 1, 1]


@pytest.mark.product
@pytest.mark.parametrize("number", [1, 2, BLOCK, BLOCK + 1, BLOCK + 2])
def test_as_many_tokens_as_asked_for(continued, number):
    made = continued(max_tokens=number).tokens
    assert made == [row[:number] for row in continued(max_tokens=LONG).tokens]


def test_shown_texts_join_to_the_answer(continued):
    shown = []
    made = continued(max_tokens=LONG, show=shown.append)
    joined = [[token for fresh in shown for token in fresh[row]] for row in range(len(PROMPTS))]
    assert joined == made.tokens
    assert len(shown) > LONG // BLOCK


@pytest.mark.product
@pytest.mark.parametrize("number", [1, BLOCK + 2, LONG])
def test_the_cache_weighs_what_is_reported(model, continued, number):
    sizes = Sizes.plan(3, 7, number)
    allocated = model.empty_cache(sizes.batch, sizes.body, sizes.tail, EXACT.type)
    reported = continued(max_tokens=number).cache_bytes
    assert reported == sum(leaf.nbytes for leaf in jax.tree.leaves(allocated))
    assert reported == cache_bytes(model, 3, sizes.body, sizes.tail, EXACT.type)


@pytest.mark.parametrize("prompt", [1, 64, 65, 1000])
@pytest.mark.parametrize("number", [1, 2, 17, 64, 65, 66, 129, 500])
def test_cache_sizes_have_room_for_all_tokens(prompt, number):
    sizes = Sizes.plan(2, prompt, number)
    assert sizes.tail <= TAIL
    assert sizes.tail % BLOCK == 0
    assert sizes.prompt >= prompt
    assert sizes.body + sizes.tail >= prompt + number - 1


LOGITS = np.array([2.0, 1.0, 0.5, 0.0, -1.0])
DRAWS = 20_000


@pytest.mark.product
@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(1.0), 5),
        (Sampling(0.5), 5),
        (Sampling(2.0, top_k=3), 3),
        (Sampling(1.0, top_k=99), 5),
        (Sampling(1.0, top_p=0.7), 2),  # probabilities 0.55, 0.20, 0.12, 0.07, 0.03
        (Sampling(1.0, top_p=1.0), 5),
        (Sampling(1.0, top_k=3, top_p=0.9), 3),
    ],
)
def test_draws_follow_the_distribution(sampling, kept):
    keys = jax.random.split(jax.random.key(0), DRAWS)
    drawn = sampling.draw(jnp.tile(jnp.asarray(LOGITS, jnp.float32), (DRAWS, 1)), keys)
    expected = np.exp(LOGITS / sampling.temperature) * (np.arange(5) < kept)
    expected *= DRAWS / expected.sum()
    counts = np.bincount(drawn, minlength=5)
    assert (counts[kept:] == 0).all()
    # 18.5 is exceeded once in a thousand by four degrees of freedom.
    assert ((counts - expected)[:kept] ** 2 / expected[:kept]).sum() < 18.5


@pytest.mark.parametrize(
    ("prompts", "number", "message"),
    [
        ([], 1, "at least one token"),
        ([[1], []], 1, "at least one token"),
        ([[1, VOCAB]], 1, f"{VOCAB}; token ids go from 0 to {VOCAB - 1}"),
        ([[-1, 2]], 1, "-1; token ids"),
        ([[1]], 0, "max_tokens: got 0"),
    ],
)
def test_prompts_that_can_not_be_read(continued, prompts, number, message):
    with pytest.raises(BadInput, match=message):
        continued(prompts, number)


@pytest.mark.product
def test_the_context_is_a_limit(weights):
    model = matrix.build("gqa", "rope", "local-global", context=8)
    with pytest.raises(BadInput, match=r"context is 8 tokens.*has 3: at most 5"):
        generate(model, weights, [[1, 2, 3]], 6, compute=EXACT)
    assert len(generate(model, weights, [[1, 2, 3]], 5, compute=EXACT).tokens[0]) == 5
