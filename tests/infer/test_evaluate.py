"""Evaluation is the mean over every token but the first, for any batch size."""

from __future__ import annotations

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.infer import evaluate as module
from mukv.infer.evaluate import Evaluation, evaluate
from tests.laws import matrix
from tests.laws.matrix import EXACT, VOCAB
from tests.pairs import params

ROWS = [matrix.tokens(1, length, seed=length)[0] for length in (12, 5, 2, 9)]
BYTES = 1 + np.arange(VOCAB) % 4


@pytest.fixture(scope="module")
def model():
    return matrix.build("gqa", "rope", "plain")


@pytest.fixture(scope="module")
def weights(model):
    return matrix.weights(model)


def by_hand(model, weights, length):
    """Compute the sum of -log p and the number of tokens, window by window in float64."""
    forward, nats, tokens = matrix.logits(model), 0.0, 0
    for row in ROWS:
        for start in range(0, len(row) - 1, length):
            window = row[start : start + length + 1]
            ids = np.zeros((1, 12), np.int32)
            ids[0, : len(window) - 1] = window[:-1]
            place = np.arange(12)[None]
            scores = np.asarray(forward(weights, ids, place, 0 * ids), np.float64)[0]
            normal = np.log(np.exp(scores).sum(axis=-1))
            chosen = scores[np.arange(len(window) - 1), window[1:]]
            nats += float((normal[: len(chosen)] - chosen).sum())
            tokens += len(chosen)
    return nats, tokens


@pytest.mark.product
@pytest.mark.parametrize("length", params([1, 3, 4, 11, 100], [3, 11]))
@pytest.mark.parametrize("batch_tokens", params([1, 24, 8192], [24]))
def test_loss(model, weights, monkeypatch, length, batch_tokens):
    monkeypatch.setattr(module, "BATCH_TOKENS", batch_tokens)
    nats, tokens = by_hand(model, weights, length)
    found = evaluate(model, weights, ROWS, length, BYTES, EXACT)
    assert found.tokens == tokens == sum(len(row) - 1 for row in ROWS)
    assert found.loss == pytest.approx(nats / tokens, rel=1e-5)
    read = sum(BYTES[row[1:]].sum() for row in ROWS)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / read, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)


def test_without_the_bytes_of_tokens(model, weights):
    assert evaluate(model, weights, ROWS, 12, None, EXACT).bits_per_byte is None


def test_a_model_with_an_overflowing_loss_has_a_finite_perplexity():
    assert math.isfinite(Evaluation(1, 1e6, None).perplexity)


@pytest.mark.parametrize(
    ("row", "length", "message"),
    [
        ([1], 4, "tokens: got 1; at least 2"),
        ([1, VOCAB], 4, f"tokens: got {VOCAB}; token ids go from 0 to {VOCAB - 1}"),
        ([-3, 1], 4, "tokens: got -3"),
        ([1, 2], 9, "length: got 9; the model's context is 8"),
    ],
)
def test_rows_that_can_not_be_read(weights, row, length, message):
    model = matrix.build("gqa", "rope", "plain", context=8)
    with pytest.raises(BadInput, match=message):
        evaluate(model, weights, [np.array(row)], length)


def test_logits_are_in_memory_for_a_chunk_of_tokens(model, weights):
    """No array of the program holds the logits of all tokens; the loss is the same."""
    chunked = replace(EXACT, loss_chunk=5)
    expected = evaluate(model, weights, ROWS, 4, None, EXACT).loss
    assert evaluate(model, weights, ROWS, 4, None, chunked).loss == pytest.approx(
        expected, rel=1e-6
    )
    ids = matrix.tokens(6, 11)
    program = jax.make_jaxpr(module._losses(model, chunked))(weights, ids, ids)
    assert "66,31]" not in str(program)
    assert "5,31]" in str(program)
    whole = jax.make_jaxpr(module._losses(model, replace(EXACT, loss_chunk=66)))(weights, ids, ids)
    assert "66,31]" in str(whole)
