"""How few entries a query needs, by layer, head and length of what it looks back on.

For every query the weights are sorted: what mass the largest hold, how many it takes for a share
of the mass, and what becomes of the output if the values of the others are never read. Queries
are gathered in octaves of the number of entries that they see; means, and the best and worst of
all queries. The mass alone says little: values of entries with small weights may be large, or
cancel (the error of the output says).
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
"""The first entries of a document, and the last ones before a query, itself included."""
NEEDED = 0.8
"""Mass of the entries that heads are compared by."""
LEAST = 32
"""Entries that a query must see for heads to be compared by it."""
QUERIES = 256
"""Queries of a row that are looked at, spread evenly."""
PARTS = ("sinks", "near", "distance")
EXTREMES = {"low": np.minimum, "high": np.maximum}


def octave(visible: Int[Array, "*queries"]) -> Int[Array, "*queries"]:
    """0 for one entry, 1 for two, 2 for three and four, 3 for five to eight ..."""
    return jnp.ceil(jnp.log2(visible.astype(jnp.float32)) - 1e-4).astype(jnp.int32)


def ranks(length: int) -> np.ndarray:
    """1, 2, 3, 4, 6, 8, 12 ... up to the length: where the sorted curve is taken."""
    powers = 2 ** np.arange(int(np.log2(length)) + 1)
    halves = powers[powers > 1] * 3 // 2
    return np.unique([rank for rank in [*powers, *halves, length] if rank <= length])


class MostRead(NamedTuple):
    """The entry that the queries of a head give the most mass.

    position: the one that holds the most over all windows, counted from its document's first
    share: mean share of the mass that the most-read entry of a window holds, wherever it is
    windows: share of the windows whose most-read entry is at this position
    """

    position: int
    share: float
    windows: float


@dataclass(frozen=True)
class Sparsity:
    """What is known of one layer. Axes: head [H], octave [O], rank [R], mass [M], share [S].

    Octaves without queries hold NaN. curve: mass of the largest weights. needed: entries for a
    mass. top: mass of the largest share of entries. error: of the output when only those values
    are read, relative to its norm; renormalised: after division by their mass. sinks, near: mass
    of the first and the last entries; distance: mean tokens back; far_from_mean: total variation
    between a head's weights and the mean over heads. agreement: of the entries that two heads
    need, the share that both do [H H]. read_share: mean share of the mass that the most-read entry
    of a window holds, by its position in its document; read_windows: share of the windows that
    have it there; of each head, then of the mean over heads [H + 1, position]. Only queries count
    that see at least LEAST entries.
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
        """The most-read entry of each head, and last of the mean over heads."""
        places = self.read_share.argmax(axis=1)
        whole = zip(places, self.read_share, self.read_windows, strict=True)
        return [MostRead(int(at), float(s.sum()), float(w[at])) for at, s, w in whole]

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
    """Every layer's, from rows of `length` tokens."""
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
        """[head octave ...]: summed over the queries of each octave."""
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

    # The smallest weight that is still needed: those before it hold less than the mass.
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
    """Find the entry of each row with the largest share of the mass of the counted queries.

    Of a row with several documents, that with the most such queries. The last head stands for the
    mean over heads. Shares are summed over rows, by the entry's position [head position].
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
        "read_share": jnp.einsum("bh,bhp->hp", jnp.max(share, axis=-1), position),
        "read_count": jnp.sum(position, axis=0),
    }


def _extremes(name: str, x: Float[Array, "batch heads query _"], place: Array) -> dict[str, Array]:
    """The least and the largest of each head and octave."""
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
