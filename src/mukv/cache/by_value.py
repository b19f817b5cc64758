"""Eviction by keys and values, without queries: CUR, LagKV and leverage scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.cache.keep import Keep, Sinking
from mukv.cache.rank import places
from mukv.cache.seen import Score, Seen
from mukv.cache.windows import Windows
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Bool, Float

RIDGE = 1e-2
"""Number added to the diagonal of the covariance of projected keys, as in kvpress."""


@dataclass(frozen=True)
class CUR(Sinking):
    """Score: |k|^2 |v|^2, each divided by its sum over a window of neighbours (CurDKV, Sengupta et
    al. 2025).

    window: entries per window; windows follow one another from the first entry on
    """

    window: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "window", most=1 << 20)

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        windows = Windows.of(seen, self.window)

        def share(x: Float[Array, "batch heads key width"]) -> Array:
            square = windows.cut(jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True))
            total = jnp.sum(square, axis=3, keepdims=True)
            return square[..., 0] / jnp.where(total > 0, total, 1.0)[..., 0]

        return windows.joined(share(seen.keys()) * share(seen.values())), {}


@dataclass(frozen=True)
class LagKV(Sinking):
    """Score: rank of an entry within its partition, by the standard deviation over channels of keys
    and values that are normalised by the next partition (LagKV, Liang et al. 2025).

    Entries after the sinks are divided into partitions. Each channel is scaled by its minimum and
    maximum in the next partition. The standard deviations of an entry's keys and of its values each
    pass through a softmax over the partition, and the two results are averaged. The last complete
    partition and all later entries have the highest score. A head with fewer than two complete
    partitions keeps its newest entries.

    lag: entries per partition
    cross: true compares entries of different partitions by the averaged softmax, false by their
        rank in the partition
    """

    lag: int = 128
    cross: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "lag", most=1 << 20)

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        windows = Windows.of(seen, self.lag, self.sinks)
        score = (_lagged(windows.cut(seen.keys())) + _lagged(windows.cut(seen.values()))) / 2
        if not self.cross:
            place = places(score.reshape(-1, score.shape[2], self.lag)).reshape(score.shape)
            score = (self.lag - 1 - place) / self.lag
        complete = windows.count // self.lag
        early = windows.rank // self.lag < complete - 1
        newest = windows.rank / jnp.maximum(windows.count, 1)
        score = jnp.where(early, windows.joined(score), 1.0)
        return jnp.where(complete < 2, newest, score), {}


def _lagged(
    x: Float[Array, "batch heads window entry width"],
) -> Float[Array, "batch heads window entry"]:
    """Scale vectors by minimum and maximum of the next window; return the softmax over the window
    of their standard deviations (unbiased). The result of the last window is meaningless."""
    x = x.astype(jnp.float32)
    after = jnp.roll(x, -1, axis=2)
    low, high = (end(after, axis=3, keepdims=True) for end in (jnp.min, jnp.max))
    scaled = (x - low) / jnp.where(high > low, high - low, 1.0)
    return jax.nn.softmax(jnp.std(scaled, axis=-1, ddof=1), axis=-1)


@dataclass(frozen=True)
class Leverage(Keep):
    """Score: approximate leverage of an entry among keys before rotation (Compactor, Chari et al.
    2025).

    Keys are centred and multiplied by a random matrix of normal numbers to a smaller width; the
    leverage of a row x is x (X^T X + 0.01 I)^-1 x^T.

    sketch: width of the random projection
    seed: seed of the random projection
    """

    sketch: int = 48
    seed: int = 0

    rotates_back: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "sketch", most=1 << 16)
        if not 0 <= self.seed < 1 << 31:
            raise BadInput("seed", self.seed, "from 0 to 2**31 - 1")

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        return leverage(seen, by_head(seen, seen.valid), self.sketch, self.seed), {}


def by_head(
    seen: Seen, which: Bool[Array, "batch stores key"]
) -> Bool[Array, "batch kv_heads key"]:
    """Repeat what is said of each store for each of its heads."""
    return jnp.repeat(which, seen.reader.attention.key_heads // which.shape[1], axis=1)


def leverage(seen: Seen, which: Bool[Array, "batch kv_heads key"], sketch: int, seed: int) -> Score:
    """Return the approximate leverage of each of these entries among all of them; meaningless and
    finite for others."""
    key, valid = seen.keys().astype(jnp.float32), which[..., None]
    position = seen.entries.position
    position = jnp.repeat(position, key.shape[1] // position.shape[1], axis=1)
    still = jnp.where(valid, seen.rotated_back(key, position), 0.0)
    number = jnp.maximum(jnp.sum(valid, axis=2, keepdims=True), 1)
    centred = jnp.where(valid, still - jnp.sum(still, axis=2, keepdims=True) / number, 0.0)
    draw = jax.random.normal(jax.random.key(seed), (key.shape[-1], sketch))
    x = jnp.einsum("bhkd,ds->bhks", centred, draw / sketch**0.5)
    square = jnp.einsum("bhks,bhkt->bhst", x, x) + RIDGE * jnp.eye(sketch)[None, None]
    solved = jax.scipy.linalg.cho_solve((jnp.linalg.cholesky(square), True), x.swapaxes(-1, -2))
    return jnp.einsum("bhks,bhsk->bhk", x, solved)
