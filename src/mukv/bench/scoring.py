"""Grade a model's predictions of the tokens of answers, with the true tokens before each as input
(teacher forcing).
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from mukv.bench.grading import calibration_error
from mukv.core.compute import Compute, settled
from mukv.core.typing import Array
from mukv.model.base import LanguageModel
from mukv.tasks import Samples

BATCH_TOKENS = 8192
"""Tokens per forward pass."""


class AnswerScores(NamedTuple):
    """Scores of all answers.

    right: whether the whole answer is correct; false where there is no answer
    tokens: fraction of the answer's tokens that are correct
    bits: negative log2 probability of the whole answer
    present: whether there is an answer
    calibration_error: expected calibration error over all graded tokens
    likeliest: predicted ids for the tokens of answers, and the true ids elsewhere
    """

    right: Bool[np.ndarray, "row answer"]
    tokens: Float[np.ndarray, "row answer"]
    bits: Float[np.ndarray, "row answer"]
    present: Bool[np.ndarray, "row answer"]
    calibration_error: float
    likeliest: Int[np.ndarray, "row token"]


@lru_cache(maxsize=8)
def _graded(model: LanguageModel, compute: Compute) -> Any:
    """Compile a function of weights, tokens [row token] and places [row graded].

    For the token at each place it returns whether its logit is larger than all others, its negative
    log probability in nats, the probability of the likeliest token, and its id; float32, the last
    int32 [row graded].
    """

    def graded(weights: Any, tokens: Array, places: Array) -> tuple[Array, Array, Array, Array]:
        hidden = model.hidden(weights, tokens, compute=compute)
        before = jnp.take_along_axis(hidden, jnp.maximum(places - 1, 0)[..., None], axis=1)
        logits = model.logits(weights, before, compute)
        wanted = jnp.take_along_axis(tokens, places, axis=1)[..., None]
        own = jnp.take_along_axis(logits, wanted, axis=-1)
        others = jnp.where(jnp.arange(logits.shape[-1])[None, None] == wanted, -jnp.inf, logits)
        # The comparison is strict, so that ties and NaN count as wrong.
        right = own[..., 0] > others.max(axis=-1)
        total = jax.nn.logsumexp(logits, axis=-1)
        likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return right, total - own[..., 0], jnp.exp(logits.max(axis=-1) - total), likeliest

    return jax.jit(graded)


def score(
    model: LanguageModel, weights: Any, samples: Samples, compute: Compute | None = None
) -> AnswerScores:
    """Grade every answer with teacher forcing. weights: stacked and scaled."""
    compute = settled(compute)
    rows, length = samples.tokens.shape
    graded = samples.graded
    most = int(graded.sum(axis=1).max())
    # The graded places of each row in order, then others as padding.
    places = np.argsort(~graded, axis=1, kind="stable")[:, :most]
    batch = max(1, min(rows, BATCH_TOKENS // length))
    call = partial(_graded(model, compute), weights)
    right, nats = np.ones(graded.shape, bool), np.zeros(graded.shape)
    confidence, likeliest = np.zeros(graded.shape), samples.tokens.copy()
    for first in range(0, rows, batch):
        here = np.arange(first, first + batch)
        # The last batch is padded with the last row, so that one shape is compiled.
        chosen = np.minimum(here, rows - 1)
        parts = call(jnp.asarray(samples.tokens[chosen]), jnp.asarray(places[chosen]))
        for whole, part in zip((right, nats, confidence, likeliest), parts, strict=True):
            whole[chosen[:, None], places[chosen]] = np.asarray(part)
    error = calibration_error(right[graded], confidence[graded])
    # The padding of places lies outside of answers.
    likeliest = np.where(graded, likeliest, samples.tokens)
    return _summed(samples, right, nats, error, likeliest)


def _summed(
    samples: Samples,
    right: Bool[np.ndarray, "row token"],
    nats: Float[np.ndarray, "row token"],
    error: float,
    likeliest: Int[np.ndarray, "row token"],
) -> AnswerScores:
    """Sum scores of tokens into scores of answers."""
    row = np.arange(len(right))[:, None]

    def total(values: np.ndarray) -> Float[np.ndarray, "row answer"]:
        before = np.cumsum(np.pad(values * samples.graded, ((0, 0), (1, 0))), axis=1)
        return before[row, samples.stop] - before[row, samples.start]

    width = np.maximum(samples.stop - samples.start, 1)
    share = total(right.astype(float)) / width
    whole = (share == 1) & samples.present
    bits = total(nats) / np.log(2)
    return AnswerScores(whole, share, bits, samples.present, error, likeliest)
