"""One budget for all layers and heads: the best entries of all are kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar

import jax.numpy as jnp

from mukv.cache.refine import Refine
from mukv.cache.seen import Score, Seen
from mukv.cache.spread import Rank, Spread, pooled
from mukv.core.typing import Array, Float, Int

PAGE = 16
"""The pool of a layer has a multiple of this many slots."""


@dataclass(frozen=True)
class Layers(Spread):
    """Let all heads of all layers share one budget (Kim et al. 2025).

    It needs scores that can be compared between layers, and that are known of all layers before any
    entry is dropped: those of `kvzip`. The pool of a layer has as many slots as entries of the
    layer are kept, rounded up to 16.
    """

    pools: ClassVar[bool] = True
    over_layers: ClassVar[bool] = True

    def ranked(
        self, own: Float[Array, "batch sets key"], seen: Seen, steps: tuple[Refine, ...]
    ) -> tuple[Rank, Int[Array, " batch"]]:
        # Entries that are not among the best of all layers have a score of -inf.
        return pooled(own), jnp.full(len(own), own.shape[1] * own.shape[2])


def best_of_layers(
    scores: Sequence[Score],
    length: Int[Array, " batch"],
    keep: Int[Array, " batch"],
    sinks: int,
    recent: int,
) -> tuple[list[Score], Int[Array, "layer batch"]]:
    """Return the scores of the best entries of all layers, -inf for others, and how many entries
    each layer keeps.

    scores: of each layer, by the entry of each token. length: tokens of each row. keep: entries of
    each row. sinks, recent: first and newest tokens, which come first. Of equal scores the newer
    entry comes first, then the one of the lower layer. Others with a score of -inf are not kept.
    """
    place = jnp.arange(scores[0].shape[-1])[None]
    certain = (place < sinks) | (place >= length[:, None] - recent)
    valid = place < length[:, None]

    def ranked(score: Score) -> Score:
        score = jnp.where(certain[:, None], jnp.inf, score)
        return jnp.where(valid[:, None], score, -jnp.inf)

    heads = list(accumulate(score.shape[1] for score in scores))[:-1]
    together = jnp.flip(jnp.concatenate([*map(ranked, scores)], axis=1), axis=2).swapaxes(1, 2)
    order = jnp.argsort(together.reshape(len(length), -1), axis=1, descending=True, stable=True)
    rank = jnp.argsort(order, axis=1).reshape(together.shape)
    chosen = jnp.flip((rank < keep[:, None, None]).swapaxes(1, 2), axis=2)
    chosen &= jnp.concatenate([*map(ranked, scores)], axis=1) > -jnp.inf
    split = jnp.split(chosen, heads, axis=1)
    counts = jnp.stack([jnp.sum(each, axis=(1, 2)) for each in split])
    return [jnp.where(*pair, -jnp.inf) for pair in zip(split, scores, strict=True)], counts
