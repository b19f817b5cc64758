"""Calibrated predictors of scores: targets are those of a dense pass, fits those of numpy."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from mukv.analysis.scores import THRESHOLDS, calibrate_scores, judge_scores
from mukv.cache.calibration import fingerprint
from mukv.cache.kvzap import BIAS, WEIGHT
from mukv.core.errors import BadInput
from mukv.infer import replay
from tests.cache.test_replay import ASKS, CHUNK, PROMPTS, dense_scores
from tests.laws import matrix

TOKENS = np.array([PROMPTS[0], PROMPTS[0][::-1]], np.int32)


def encode(text):
    return np.array(ASKS[replay.ASKS.index(text)])


def fitted(x, y):
    """Return weights and biases of a ridge regression on standardised features."""
    mean, scale = x.mean(0), x.std(0)
    z = (x - mean) / scale
    weight = np.linalg.solve(z.T @ z + np.eye(len(mean)), z.T @ (y - y.mean(0))) / scale[:, None]
    return weight, y.mean(0) - mean @ weight


@pytest.mark.product
def test_predictors():
    """Targets are logarithms of the scores of KVzip+ without the first 4 tokens. Fits, their share
    of the variance, and what thresholds keep, equal numpy's."""
    model = matrix.build("gqa", "rope", "plain")
    weights = matrix.weights(model)
    batches = [TOKENS[:1], TOKENS[1:]]
    made, reader = calibrate_scores(model, weights, batches, encode, CHUNK, matrix.EXACT)
    assert made.fingerprint == fingerprint(weights)
    assert made.facts["tokens"] == TOKENS.size
    pairs = reader.pairs(TOKENS)
    dense = np.stack(dense_scores(model, TOKENS.tolist(), plus=True))
    predicted = judge_scores(made, reader, [TOKENS])
    for layer, (index, (x, y)) in enumerate(pairs.items()):
        np.testing.assert_allclose(np.exp(y), dense[:, layer, :, 4:], rtol=2e-3, atol=1e-7)
        x = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
        y = np.moveaxis(np.asarray(y, np.float64), 1, 2).reshape(len(x), -1)
        weight, bias = fitted(x, y)
        guess = x @ weight + bias
        arrays = made.layers[index]
        own = x @ np.asarray(arrays[WEIGHT], np.float64) + np.asarray(arrays[BIAS])
        np.testing.assert_allclose(own, guess, atol=1e-3)
        r2 = np.mean(1 - ((y - guess) ** 2).mean(0) / y.var(0))
        assert r2 > 0.05
        np.testing.assert_allclose(predicted[layer].r2, r2, atol=1e-3)
        kept = [np.mean(guess >= least) for least in THRESHOLDS]
        np.testing.assert_allclose(predicted[layer].kept, kept, atol=0.01)


def test_a_model_that_kvzip_does_not_fit_is_refused():
    model = matrix.build("gqa", "cope", "plain")
    with pytest.raises(BadInput, match="cope, which depends on all entries"):
        calibrate_scores(model, matrix.weights(model), [TOKENS], encode)


@pytest.mark.product
def test_calibrated_beside_a_model(mukv, trained, tmp_path):
    """`analyze` saves predictors with which `generate` and `compress` run; without them both refuse
    the policy, and with those of other weights too."""
    folder = tmp_path / "model"
    shutil.copytree(trained, folder)
    cached = ["--prompt", "a few words", "--max-tokens", 8, "--cache", "kvzap:0.5"]
    done = mukv("generate", folder, *cached)
    assert (done.returncode, "--calibrate scores" in done.stderr) == (2, True), done.stderr
    given = ["--samples", 4, "--length", 64, "--calibration-tokens", 256]
    done = mukv("analyze", folder, *given, "--calibrate", "scores", "--json")
    assert done.returncode == 0, done.stderr
    assert '"kind": "scores"' in done.stdout
    assert (folder / "predictors" / "weights.safetensors").exists()
    for words in (cached, [*cached[:-1], "kvzap+threshold(least=-9,window=4)"]):
        done = mukv("generate", folder, *words)
        assert done.returncode == 0, done.stderr
