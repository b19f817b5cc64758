"""Eviction by predicted KVzip+ scores: a small model per layer in place of a second reading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from mukv.cache.by_value import by_head
from mukv.cache.keep import CARRIED, Sinking
from mukv.cache.seen import Score, Seen
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Bool, Float

WEIGHT, BIAS = "score_weight", "score_bias"
"""Names of the calibrated arrays of a layer: [feature kv_heads] and [kv_heads]."""
LEAST = 1e-6
"""Least norm of which the logarithm is taken."""
NEEDED = "a model with calibrated predictors of scores: mukv analyze MODEL --calibrate scores"

Features = Float[Array, "batch token feature"]


@dataclass(frozen=True)
class KVzap(Sinking):
    """Score: predicted logarithm of the KVzip+ score, linear in the keys (before rotation) and
    values that the token writes in all heads of the layer, and in the logarithms of their norms
    (after KVzap, Jegou and Jeblick 2026, which predicts from hidden states).

    The predictor is calibrated once per model. An entry is scored once, when it joins the body, and
    keeps its score.
    """

    carries: ClassVar[bool] = True
    signed: ClassVar[bool] = True
    rotates_back: ClassVar[bool] = True
    calibrated: ClassVar[tuple[str, ...]] = (WEIGHT, BIAS)

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        if WEIGHT not in seen.notes:
            raise BadInput("policy", "kvzap", NEEDED)
        assert seen.carried is not None
        found, new = new_features(seen)
        place = jnp.clip(jnp.cumsum(new, axis=-1) - 1, 0, found.shape[1] - 1)
        own = jnp.take_along_axis(predicted(found, seen.notes), place, axis=2)
        carried = jnp.repeat(seen.carried, own.shape[1] // seen.carried.shape[1], axis=1)
        score = jnp.where(new, own, carried)
        return score, {**seen.notes, CARRIED: score}


def predicted(found: Features, arrays: Mapping[str, Array]) -> Float[Array, "batch kv_heads token"]:
    """Return the predicted logarithm of each token's score. arrays: of the layer, by name."""
    return jnp.einsum("btf,fh->bht", found, arrays[WEIGHT]) + arrays[BIAS][None, :, None]


def new_features(seen: Seen) -> tuple[Features, Bool[Array, "batch kv_heads key"]]:
    """Return the features of the new tokens in order, meaningless and finite after the last one of
    a row, and which entries are those of new tokens."""
    new = by_head(seen, seen.valid & (seen.entries.position >= seen.length[:, None, None]))
    # In a pool the entries of each head are at places of their own.
    tokens = new.shape[-1] // (seen.valid.shape[1] // seen.entries.position.shape[1])
    order = jnp.argsort(~new, axis=-1, stable=True)[..., :tokens, None]
    key, value = (jnp.take_along_axis(x, order, axis=2) for x in (seen.keys(), seen.values()))
    position = seen.length[:, None, None] + jnp.arange(tokens)[None, None]
    return features(seen.rotated_back(key, position), value), new


def features(
    key: Float[Array, "batch kv_heads token width"],
    value: Float[Array, "batch kv_heads token value_dim"],
) -> Features:
    """Return keys and values of all heads, and the logarithms of their norms, by token.

    key: before rotation
    """
    parts = []
    for x in (key.astype(jnp.float32), value.astype(jnp.float32)):
        size = jnp.log(jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), LEAST))
        both = jnp.concatenate([x, size], axis=-1).swapaxes(1, 2)
        parts.append(both.reshape(*both.shape[:2], -1))
    return jnp.concatenate(parts, axis=-1)
