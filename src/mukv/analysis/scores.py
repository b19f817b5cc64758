"""Calibrate predictors of KVzip+ scores, for the policy `kvzap`, by ridge regression.

A text is read twice, as `kvzip` reads a prompt. The second reading gives the score of each entry; a
linear map of what the token wrote in all heads of the layer is fitted to its logarithm. Sums of
products are added over batches, so that the arrays held do not grow with the text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.cache import Policy, Reader, Ring
from mukv.cache.calibration import fingerprint
from mukv.cache.kvzap import BIAS, WEIGHT, new_features, predicted
from mukv.cache.predictors import Predictors
from mukv.cache.replay import KVzip
from mukv.cache.seen import Seen
from mukv.core.compute import Compute, settled
from mukv.core.typing import Array, Float
from mukv.infer.decode import decoding_weights
from mukv.infer.replay import asking, replayed
from mukv.model.decoder import Decoder
from mukv.model.policy_check import check_policy

RIDGE = 1.0
"""Penalty of the squared weights of standardised features (KVzap)."""
LEAST = 1e-12
"""Least score of which the logarithm is taken."""
THRESHOLDS = (-3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0)
"""Thresholds at which the fraction of kept entries is measured."""


@dataclass(frozen=True)
class Predicted:
    """How well the predictor of one layer does on a text that it was not fitted to.

    layer: index of the writing layer
    r2: fraction of the variance of the logarithm that is predicted, mean over KV heads
    kept: fraction of the entries whose predicted score reaches each of `THRESHOLDS`
    """

    layer: int
    r2: float
    kept: tuple[float, ...]


@dataclass
class _Sums:
    """Sums over tokens of features x and targets y of one layer, float64."""

    count: int
    x: Float[np.ndarray, " feature"]
    y: Float[np.ndarray, " kv_heads"]
    xx: Float[np.ndarray, "feature feature"]
    xy: Float[np.ndarray, "feature kv_heads"]

    def add(self, other: _Sums) -> None:
        self.count += other.count
        for name in ("x", "y", "xx", "xy"):
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def fitted(self) -> dict[str, Array]:
        """Return weights and biases of the ridge regression on standardised features."""
        mean, target = self.x / self.count, self.y / self.count
        covariance = self.xx / self.count - np.outer(mean, mean)
        # A constant feature has no weight.
        scale = np.sqrt(np.maximum(np.diag(covariance), 0))
        scale = np.where(scale > 1e-6, scale, np.inf)
        square = self.count * covariance / np.outer(scale, scale) + RIDGE * np.eye(len(mean))
        both = self.count * (self.xy / self.count - np.outer(mean, target)) / scale[:, None]
        weight = np.linalg.solve(square, both) / scale[:, None]
        arrays = {WEIGHT: weight, BIAS: target - mean @ weight}
        return {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}


FittedPairs = dict[int, tuple[Array, Array]]
"""Features [batch token feature] and logarithms of scores [batch kv_heads token] by layer."""


@dataclass(frozen=True)
class Rereader:
    """A model that reads texts twice, and returns features and KVzip+ scores of their tokens.

    stored: weights as they are saved, unscaled
    encode: function that encodes the instructions of `kvzip` as token ids
    chunk: tokens that are repeated at once; None for those of `kvzip`
    """

    model: Decoder
    stored: Mapping[str, Any]
    encode: Callable[[str], np.ndarray]
    compute: Compute
    chunk: int | None = None

    @cached_property
    def keep(self) -> KVzip:
        """The policy that scores. Raises BadInput for a model that it does not fit."""
        policy = asking(Policy.parse("kvzip(plus=true)+uniform"), self.encode)
        check_policy(self.model.stack, policy)
        assert isinstance(policy.keep, KVzip)
        return replace(policy.keep, chunk=self.chunk or policy.keep.chunk)

    @cached_property
    def weights(self) -> Any:
        return decoding_weights(self.model, self.stored, self.compute)

    @cached_property
    def _read(self) -> Any:
        def read(weights: Any, cache: Any, tokens: Array) -> Any:
            count = jnp.full(len(tokens), tokens.shape[1])
            _, cache = self.model.prefill(weights, cache, tokens, count, True, self.compute)
            return cache

        return jax.jit(read, donate_argnums=1)

    @cached_property
    def _features(self) -> Any:
        def found(weights: Any, cache: Any) -> list[Array]:
            nothing, made = jnp.zeros_like(cache.length), []
            for (layer, _, bag), slot in zip(self.model.stack.bags, cache.slots, strict=True):
                if bag.window is None:
                    assert isinstance(slot.body, Ring)
                    reader = Reader(layer.softmax, weights["layers"][layer.index]["read"])
                    entries = slot.body.entries(cache.length)
                    seen = Seen(reader, entries, nothing, cache.length, cache.length, None, {})
                    made.append(new_features(seen)[0])
            return made

        return jax.jit(found)

    def pairs(self, tokens: np.ndarray) -> FittedPairs:
        """Read rows of tokens [batch token] twice."""
        rows, length = tokens.shape
        cache = self.model.empty_cache(rows, length, 1, self.compute.type)
        cache = self._read(self.weights, cache, jnp.asarray(tokens))
        prompts = tokens.tolist()
        scores, _ = replayed(self.model, self.weights, cache, prompts, self.keep, self.compute)
        found = self._features(self.weights, cache)
        layers = [layer.index for layer, _, bag in self.model.stack.bags if bag.window is None]
        start, stop = self.keep.sinks, tokens.shape[1]
        return {
            index: (x[:, start:], jnp.log(jnp.maximum(score[:, :, start:stop], LEAST)))
            for index, x, score in zip(layers, found, scores, strict=True)
        }


def calibrate_scores(
    model: Decoder,
    stored: Mapping[str, Any],
    batches: Iterable[np.ndarray],
    encode: Callable[[str], np.ndarray],
    chunk: int | None = None,
    compute: Compute | None = None,
) -> tuple[Predictors, Rereader]:
    """Fit a predictor of log KVzip+ scores for each layer that writes entries without a window.

    stored: weights as they are saved, unscaled; the result has their fingerprint
    batches: rows of tokens, int [batch token], all of one shape. The first tokens, which `kvzip`
        keeps for certain, are left out
    encode: function that encodes a text as token ids
    chunk: tokens that are repeated at once; None for those of `kvzip`
    compute: settings of the forward pass; None for the defaults of the platform

    Returns the predictors, and what they were fitted with. Raises BadInput for a model that `kvzip`
    does not fit.
    """
    reader = Rereader(model, stored, encode, settled(compute), chunk)
    total: dict[int, _Sums] = {}
    rows = tokens = 0
    for batch in batches:
        rows, tokens = rows + len(batch), tokens + batch.size
        for index, (x, y) in reader.pairs(batch).items():
            sums = _summed(x, y)
            if index in total:
                total[index].add(sums)
            else:
                total[index] = sums
    layers = {index: sums.fitted() for index, sums in total.items()}
    facts = {"texts": rows, "tokens": tokens, "chunk": reader.keep.chunk, "ridge": RIDGE}
    return Predictors(fingerprint(stored), layers, facts), reader


def judge_scores(
    predictors: Predictors, reader: Rereader, batches: Iterable[np.ndarray]
) -> list[Predicted]:
    """Compare predicted with KVzip+ scores on other rows of tokens, int [batch token]."""
    found: dict[int, list[list[np.ndarray]]] = {}
    for batch in batches:
        for index, (x, y) in reader.pairs(batch).items():
            guess = predicted(x, predictors.layers[index])
            found.setdefault(index, []).append([np.asarray(guess), np.asarray(y)])
    return [_predicted(index, parts) for index, parts in found.items()]


def _predicted(index: int, parts: Sequence[Sequence[np.ndarray]]) -> Predicted:
    guess, y = (np.concatenate(each).astype(np.float64) for each in zip(*parts, strict=True))
    left = np.mean((y - guess) ** 2, axis=(0, 2))
    spread = np.maximum(np.var(y, axis=(0, 2)), 1e-12)
    kept = tuple(float(np.mean(guess >= least)) for least in THRESHOLDS)
    return Predicted(index, float(np.mean(1 - left / spread)), kept)


def _summed(x: Array, y: Array) -> _Sums:
    x, y = x.reshape(-1, x.shape[-1]), jnp.moveaxis(y, 1, 2).reshape(-1, y.shape[1])
    parts = _products(x, y)
    return _Sums(len(x), *(np.asarray(part, np.float64) for part in parts))


@jax.jit
def _products(x: Array, y: Array) -> tuple[Array, ...]:
    exact = jax.lax.Precision.HIGHEST
    xx, xy = (jnp.matmul(x.T, other, precision=exact) for other in (x, y))
    return jnp.sum(x, axis=0), jnp.sum(y, axis=0), xx, xy
