"""Measure how sparse attention is, by layer, head and number of visible entries.

The weights of each query are sorted. The measures are the mass of the largest weights, the number
of entries that hold a given fraction of the mass, and the relative error of the output if only the
values of the largest weights are read. (The mass does not determine this error: values of entries
with small weights may be large, or cancel.) Queries are grouped by octave of the number of entries
that they see. Each measure is averaged over a group; some also have the minimum and maximum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mukv.analysis.capture import Captured, CapturedRows, summed
from mukv.core.compute import Compute
from mukv.core.typing import Array, Float, Int
from mukv.model.decoder import Decoder
from mukv.model.plan import ResolvedLayer

MASSES = (0.8, 0.9, 0.95, 0.99, 0.999)
SHARES = (0.01, 0.05, 0.1, 0.2)
SINKS, NEAR = 4, 16
"""Number of entries that count as sinks (the first of a document), and as near (the last up to the
query's own)."""
NEEDED = 0.8
"""Fraction of a query's attention mass that its needed entries hold, when heads are compared."""
LEAST = 32
"""Number of entries that a query must see to count when heads or clusters are compared."""
QUERIES = 256
"""Maximum number of queries that are measured per row, evenly spaced."""
PARTS = ("sinks", "near", "distance")
EXTREMES = {"low": np.minimum, "high": np.maximum}


def octave(visible: Int[Array, "*queries"]) -> Int[Array, "*queries"]:
    """Return ceil(log2(visible)): 0 for one entry, 1 for two, 2 for three and four, and so on."""
    return jnp.ceil(jnp.log2(visible.astype(jnp.float32)) - 1e-4).astype(jnp.int32)


def ranks(length: int) -> np.ndarray:
    """Return the numbers of largest weights at which the mass is recorded: 1, 2, 3, 4, 6, 8, 12 and
    so on, and the length itself."""
    powers = 2 ** np.arange(int(np.log2(length)) + 1)
    halves = powers[powers > 1] * 3 // 2
    return np.unique([rank for rank in [*powers, *halves, length] if rank <= length])


class MostRead(NamedTuple):
    """The entry to which the queries of a head give the most attention mass, in each window.

    position: position of the entry in its document; median over windows
    share: fraction of the attention mass; mean over windows
    first: fraction of the windows in which the entry is one of the first SINKS
    """

    position: int
    share: float
    first: float


@dataclass(frozen=True)
class Sparsity:
    """Measures of one layer, float64. Axes: head [H], octave [O], rank [R], mass [M], share [S].

    Measures with an octave axis are means over the queries of an octave, and NaN in octaves without
    queries.

    queries: number of queries [O]
    ranks: numbers of largest weights [R] (see `ranks`)
    curve: mass of `ranks` largest weights; "mean", "low" and "high" over queries, each [H O R]
    needed: number of entries that hold a fraction MASSES of the mass; "mean", "low" and "high" over
        queries, each [H O M]
    top: mass of the entries with the largest weights, a fraction SHARES of the visible ones [H O S]
    error: relative error of the output (norm of the difference over norm) when only the values of
        these entries are read [H O S]
    renormalised: relative error of that output divided by the mass of these entries [H O S]
    sinks, near: mass of the first SINKS entries of a document, and of the last NEAR [H O]
    distance: mean distance of entries from the query, in tokens, weighted by attention [H O]
    far_from_mean: total variation between a head's weights and the mean over heads [H O]
    agreement: intersection over union of two heads' entries with NEEDED of the mass [H H]
    read_share: mass of the most-read entry of a window, mean over windows; for each head, and last
        for the mean over heads [H + 1]
    read_windows: fraction of the windows whose most-read entry is at a position [H + 1 position]
    """

    layer: int
    queries: np.ndarray
    ranks: np.ndarray
    curve: dict[str, np.ndarray]
    needed: dict[str, np.ndarray]
    top: np.ndarray
    error: np.ndarray
    renormalised: np.ndarray
    sinks: np.ndarray
    near: np.ndarray
    distance: np.ndarray
    far_from_mean: np.ndarray
    agreement: np.ndarray
    read_share: np.ndarray
    read_windows: np.ndarray

    @property
    def most_read(self) -> list[MostRead]:
        """The most-read entry of each head, and last that of the mean over heads."""
        median = np.argmax(np.cumsum(self.read_windows, axis=1) >= 0.5 - 1e-6, axis=1)
        first = self.read_windows[:, :SINKS].sum(axis=1)
        parts = zip(median, self.read_share, first, strict=True)
        return [MostRead(int(position), float(share), float(x)) for position, share, x in parts]

    @property
    def longest(self) -> int:
        """The octave of the longest context that has queries."""
        return int(np.flatnonzero(self.queries)[-1])


def measure(
    model: Decoder,
    weights: Any,
    batches: Iterable[CapturedRows],
    length: int,
    compute: Compute | None = None,
) -> list[Sparsity]:
    """Measure every layer on rows of `length` tokens.

    weights: stacked and scaled
    batches: rows of one shape; padding is not counted

    Raises BadInput for layers whose attention has other stores than one entry per token.
    """
    octaves = math.ceil(math.log2(length)) + 1
    at = ranks(length)

    def reduction(layer: ResolvedLayer, seen: Captured) -> dict[str, Array]:
        return _sums(layer, seen, octaves, at)

    extremes = {f"{x}_{end}": take for x in ("curve", "needed") for end, take in EXTREMES.items()}
    found = summed(model, weights, batches, reduction, extremes, compute)
    return [_finished(index, sums, at) for index, sums in found.items()]


def _sums(layer: ResolvedLayer, seen: Captured, octaves: int, at: np.ndarray) -> dict[str, Array]:
    batch, _, _, length, _ = seen.weights.shape
    taken = np.unique(np.linspace(0, length - 1, min(QUERIES, length)).astype(int))[::-1]
    heads = seen.weights.reshape(batch, -1, length, length)[:, :, taken]
    here = seen.position[:, taken]
    visible = here + 1 if layer.window is None else jnp.minimum(here + 1, layer.window)
    real = (seen.segment[:, taken] > 0).astype(jnp.float32)
    place = jax.nn.one_hot(octave(visible), octaves) * real[..., None]

    def by_octave(x: Float[Array, "batch heads query *_"]) -> Array:
        """Sum over the queries of each octave; returns [head octave *_]."""
        return jnp.einsum("bhq...,bqo->ho...", x, place)

    ordered = -jnp.sort(-heads, axis=-1)
    mass = jnp.cumsum(ordered, axis=-1)
    total = mass[..., -1:]
    curve = mass[..., at - 1]
    needed = jnp.stack([1 + jnp.sum(mass < m * total, axis=-1) for m in MASSES], axis=-1)
    needed = jnp.minimum(needed, visible[:, None, :, None]).astype(jnp.float32)
    sums = {
        "queries": jnp.sum(place, axis=(0, 1)),
        "curve": by_octave(curve),
        "needed": by_octave(needed),
        **_extremes("curve", curve, place),
        **_extremes("needed", needed, place),
    }

    tops, errors, renormalised = [], [], []
    value = jnp.repeat(seen.value, heads.shape[1] // seen.value.shape[1], axis=1)
    exact = jnp.einsum("bhqk,bhkd->bhqd", heads, value)
    size = jnp.maximum(jnp.linalg.norm(exact, axis=-1), 1e-30)
    for share in SHARES:
        count = jnp.ceil(share * visible).astype(jnp.int32)[:, None, :, None]
        count = jnp.broadcast_to(count, (*heads.shape[:3], 1))
        least = jnp.take_along_axis(ordered, count - 1, axis=-1)
        kept = jnp.where(heads >= least, heads, 0.0)
        out, own = jnp.einsum("bhqk,bhkd->bhqd", kept, value), jnp.sum(kept, axis=-1)
        tops.append(own)
        errors.append(jnp.linalg.norm(out - exact, axis=-1) / size)
        scaled = out * (total[..., 0] / jnp.maximum(own, 1e-30))[..., None]
        renormalised.append(jnp.linalg.norm(scaled - exact, axis=-1) / size)
    for name, values in (("top", tops), ("error", errors), ("renormalised", renormalised)):
        sums[name] = by_octave(jnp.stack(values, axis=-1))

    enough = min(LEAST, length if layer.window is None else min(layer.window, length))
    sums |= _most_read(seen, heads, taken, real * (visible >= enough))

    back = here[:, None, :, None] - seen.position[:, None, None, :]
    first = (seen.position < SINKS)[:, None, None, :]
    sums["sinks"] = by_octave(jnp.sum(heads * first, axis=-1))
    sums["near"] = by_octave(jnp.sum(jnp.where(back < NEAR, heads, 0.0), axis=-1))
    sums["distance"] = by_octave(jnp.sum(heads * jnp.maximum(back, 0), axis=-1))
    middle = jnp.mean(heads, axis=1, keepdims=True)
    sums["far_from_mean"] = by_octave(jnp.sum(jnp.abs(heads - middle), axis=-1) / 2)

    # Index of the smallest needed weight in sorted order: the weights before it hold less than
    # NEEDED of the mass.
    last = jnp.sum(mass < NEEDED * total, axis=-1, keepdims=True)
    last = jnp.minimum(last, length - 1)
    set_of = (heads >= jnp.take_along_axis(ordered, last, axis=-1)) & (heads > 0)
    members = set_of.astype(jnp.float32)
    both = jnp.einsum("bhqk,bgqk->bhgq", members, members)
    size_of = jnp.sum(members, axis=-1)
    either = size_of[:, :, None] + size_of[:, None] - both
    counted = real * (visible >= LEAST)
    share = both / jnp.maximum(either, 1.0)
    sums["agreement"] = jnp.einsum("bhgq,bq->hg", share, counted)
    sums["compared"] = jnp.sum(counted)
    return sums


def _most_read(
    seen: Captured,
    heads: Float[Array, "batch heads query key"],
    taken: np.ndarray,
    counted: Float[Array, "batch query"],
) -> dict[str, Array]:
    """Find in each row the entry with the largest fraction of the counted queries' mass.

    Returns the number of rows, the sum of these fractions over rows [head], and the number of rows
    by the entry's position in its document [head position]. Of a row with several documents only
    the one with the most counted queries counts. The last head is the mean over heads.
    """
    length = seen.position.shape[1]
    same = seen.segment[:, taken, None] == seen.segment[:, None, :]
    queries = jnp.einsum("bq,bqk->bk", counted, same.astype(jnp.float32))
    main = (queries > 0) & (queries == jnp.max(queries, axis=1, keepdims=True))
    mass = jnp.einsum("bhqk,bq->bhk", heads, counted)
    mass = jnp.concatenate([mass, jnp.mean(mass, axis=1, keepdims=True)], axis=1)
    share = jnp.where(main[:, None], mass / jnp.maximum(queries, 1.0)[:, None], 0.0)
    found = jnp.any(main, axis=1).astype(jnp.float32)
    at = jnp.take_along_axis(seen.position, jnp.argmax(share, axis=-1), axis=1)
    position = jax.nn.one_hot(at, length) * found[:, None, None]
    return {
        "read_rows": jnp.sum(found),
        "read_share": jnp.einsum("bh,b->h", jnp.max(share, axis=-1), found),
        "read_count": jnp.sum(position, axis=0),
    }


def _extremes(name: str, x: Float[Array, "batch heads query _"], place: Array) -> dict[str, Array]:
    """Return the minimum and the maximum over queries, each [head octave _]."""
    inside = (place > 0)[:, None, :, :, None]
    wide = x[:, :, :, None]
    return {
        f"{name}_low": jnp.min(jnp.where(inside, wide, jnp.inf), axis=(0, 2)),
        f"{name}_high": jnp.max(jnp.where(inside, wide, -jnp.inf), axis=(0, 2)),
    }


def _finished(index: int, sums: dict[str, np.ndarray], at: np.ndarray) -> Sparsity:
    queries, rows = sums["queries"], max(float(sums["read_rows"]), 1.0)
    empty = queries == 0

    def mean(name: str) -> np.ndarray:
        x = sums[name]
        shape = (1, len(queries)) + (1,) * (x.ndim - 2)
        return x / np.where(empty, np.nan, queries).reshape(shape)

    def spread(name: str) -> dict[str, np.ndarray]:
        low, high = sums[f"{name}_low"], sums[f"{name}_high"]
        low, high = (np.where(np.isfinite(each), each, np.nan) for each in (low, high))
        return {"mean": mean(name), "low": low, "high": high}

    single = ("top", "error", "renormalised", *PARTS, "far_from_mean")
    return Sparsity(
        layer=index,
        queries=queries,
        ranks=at,
        curve=spread("curve"),
        needed=spread("needed"),
        agreement=sums["agreement"] / max(float(sums["compared"]), 1.0),
        read_share=sums["read_share"] / rows,
        read_windows=sums["read_count"] / rows,
        **{name: mean(name) for name in single},
    )
