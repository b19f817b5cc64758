"""KVzap keeps the entries with the best predicted scores; each is scored once, when it is new."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from mukv.cache import Policy
from mukv.cache.calibration import fingerprint
from mukv.cache.kvzap import BIAS, WEIGHT
from mukv.cache.predictors import Predictors, load_predictors
from mukv.core.errors import BadInput
from mukv.model.counting import cache_bytes
from mukv.train.training import Training
from tests.laws.matrix import EXACT
from tests.laws.test_policies import (
    LENGTH,
    TAIL,
    One,
    best_of,
    by_head,
    decode,
    model_of,
    positions,
)
from tests.pairs import params

FEATURES = 2 * (2 * 8 + 2)
ROOM = 2, LENGTH, TAIL, EXACT.type


@pytest.fixture(scope="module")
def one():
    return One()


def drawn(seed=0):
    random = np.random.default_rng(seed)
    weight = jnp.asarray(random.standard_normal((FEATURES, 2)), jnp.float32)
    return {WEIGHT: weight, BIAS: jnp.array([0.5, -0.5])}


def predicted(one, row, arrays):
    """Compute the scores [head, place] of all places of a row, prompt and newest tokens."""
    index = one.rows(row)
    key, value = one.key[row][:, index], one.value[row][:, index]
    # Rotated back by the complex form of RoPE.
    turn = np.array(one.place[row][index])[:, None] * 100.0 ** -(np.arange(4) / 4)
    still = (key[..., :4] + 1j * key[..., 4:]) * np.exp(-1j * turn)
    still = np.concatenate([still.real, still.imag], axis=-1)
    parts = []
    for x in (still, value):
        size = np.log(np.linalg.norm(x, axis=-1, keepdims=True))
        parts += [part for head in zip(x, size, strict=True) for part in head]
    weight, bias = (np.asarray(arrays[name], np.float64) for name in (WEIGHT, BIAS))
    return (np.concatenate(parts, axis=-1) @ weight + bias).T


NAMES = ["kvzap", "kvzap(sinks=0)+adaptive(floor=0)"]


@pytest.mark.parametrize("name", params(NAMES, NAMES[1:]))
def test_kept(one, name):
    """The best predicted scores after the prompt, and of these and the newest tokens after a fold;
    with a pool the best of both heads."""
    arrays, shared = drawn(), "adaptive" in name
    bodies = one.body(name, 12.0, noted=arrays)
    for row, count in enumerate(one.count):
        score, among = predicted(one, row, arrays), [list(range(count))] * 2
        if not shared:
            score[:, :4] = np.inf
        for body, read in zip(bodies, (count, count + 6), strict=True):
            own = np.full(score.shape, -np.inf)
            for head, places in enumerate(among):
                own[head, places] = score[head, places]
            own[:, read - 1] = np.inf
            if shared:
                best, places = best_of(own.ravel(), 24), len(own[0])
                expected = [[i % places for i in best if i // places == h] for h in (0, 1)]
                found = by_head(body, row)
            else:
                expected = [best_of(each, 12) for each in own]
                found = [positions(body, row, head) for head in range(2)]
            assert found == expected
            among = [[*places, *range(count, count + 6)] for places in found]


@pytest.mark.product
def test_threshold(one):
    """With a threshold the entries whose predicted score reaches it, and those of the window."""
    arrays = drawn(1)
    least = float(np.median(predicted(one, 0, arrays)))
    name = f"kvzap(sinks=0)+threshold(least={least:.6f},window=5)"
    body, _ = one.body(name, 1.0, noted=arrays)
    for row, count in enumerate(one.count):
        score = predicted(one, row, arrays)[:, :count]
        score[:, count - 5 :] = np.inf
        for head in range(2):
            assert positions(body, row, head) == np.flatnonzero(score[head] >= least).tolist()


@pytest.mark.product
@pytest.mark.parametrize("name", ["kvzap", "kvzap+adaptive"])
def test_full_budget_and_bytes(name):
    """Law 7; and law 4: a score for each entry, and the predictors, once for all rows."""
    model, policy, arrays = model_of("gqa", "rope"), Policy.parse(name), {0: drawn()}
    full, whole = decode(model, Policy.parse("full"))
    found, cache = decode(model, policy, arrays)
    np.testing.assert_allclose(found, full, atol=3e-5)
    pool = 4 * 2 * LENGTH if "adaptive" in name else 0  # the head that an entry belongs to
    beside = 2 * LENGTH * 4 + 2 * LENGTH * 4 + pool  # positions and scores
    assert cache.nbytes() - whole.nbytes() == 2 * beside + 4 * (FEATURES * 2 + 2)
    without = cache_bytes(model, *ROOM, policy)
    assert cache.nbytes() == without + 4 * (FEATURES * 2 + 2)


def test_a_calibration_of_another_model_is_refused(tmp_path):
    weights = {"embedding": np.ones((3, 2), np.float32)}
    with pytest.raises(BadInput, match="--calibrate scores"):
        load_predictors(tmp_path, weights)
    path = Predictors(fingerprint(weights), {3: drawn()}, {"tokens": 9}).save(tmp_path)
    found = load_predictors(tmp_path, weights)
    assert path.name == "predictors"
    assert (found.facts, list(found.layers)) == ({"tokens": 9}, [3])
    np.testing.assert_array_equal(found.layers[3][WEIGHT], drawn()[WEIGHT])
    with pytest.raises(BadInput, match="predictors of scores of the weights"):
        load_predictors(tmp_path, {"embedding": np.zeros((3, 2), np.float32)})
    Predictors(fingerprint(weights), {3: {BIAS: drawn()[BIAS]}}, {}).save(tmp_path)
    with pytest.raises(BadInput, match="layer 3: got 'score_bias'"):
        load_predictors(tmp_path, weights)


def test_without_predictors(one):
    with pytest.raises(BadInput, match="a model with calibrated predictors of scores"):
        one.body("kvzap", 12.0)
    with pytest.raises(BadInput, match="a policy that is not calibrated"):
        Training(policy="kvzap:0.5")
