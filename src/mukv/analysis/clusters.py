"""Measure how well cluster centres predict which entries have large attention weights.

A query scores the centres. Its entries are read cluster by cluster in the order of the scores, the
latest first within a cluster, until a given fraction of the visible entries is read. The results,
by head, are the attention mass of the entries read; their precision, recall and F1 against the
entries that hold 80 % of the mass; and the sizes of the clusters. For comparison there is the mass
of equally many entries with the largest weights (the upper bound), and of equally many latest
entries.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.analysis.calibrate import turned
from mukv.analysis.capture import Captured, CapturedRows, summed
from mukv.analysis.sparsity import LEAST, NEEDED, QUERIES
from mukv.cache.centres import Centres
from mukv.core.compute import Compute
from mukv.core.typing import Array
from mukv.model.decoder import Decoder
from mukv.model.plan import ResolvedLayer

READS = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
"""Fractions of the visible entries that are read."""
MEASURES = ("captured", "largest", "latest", "precision", "recall", "f1")


@dataclass(frozen=True)
class Prediction:
    """Measures of one layer, float64 [head read]; the axis `read` has the fractions of READS. They
    are means over queries, and NaN where no query sees LEAST entries.

    captured: attention mass of the entries that the clusters choose
    largest, latest: mass of equally many entries with the largest weights, and of equally many
        latest entries
    precision, recall, f1: scores of the chosen entries against the entries that hold NEEDED of the
        mass
    sizes: fraction of all entries in each cluster, largest first [kv_head cluster]
    """

    layer: int
    captured: np.ndarray
    largest: np.ndarray
    latest: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    sizes: np.ndarray


def judge(
    model: Decoder,
    weights: Any,
    centres: Centres,
    batches: Iterable[CapturedRows],
    compute: Compute | None = None,
) -> list[Prediction]:
    """Measure the centres in every layer, over queries that see at least LEAST entries.

    weights: stacked and scaled
    batches: rows of one shape; padding is not counted

    Raises BadInput for layers whose attention has other stores than one entry per token.
    """

    def reduction(layer: ResolvedLayer, seen: Captured) -> dict[str, Array]:
        return _sums(layer, turned(layer, seen, centres.rotated), centres)

    found = summed(model, weights, batches, reduction, {}, compute)
    return [_finished(index, sums) for index, sums in found.items()]


def _sums(layer: ResolvedLayer, seen: Captured, centres: Centres) -> dict[str, Array]:
    batch, kv_heads, group, length, _ = seen.weights.shape
    taken = np.unique(np.linspace(0, length - 1, min(QUERIES, length)).astype(int))[::-1]
    own = centres.layers[layer.source]
    labels = own.labels(seen.key, centres.kind)
    query = seen.query[:, :, :, taken].reshape(batch, kv_heads, -1, seen.query.shape[-1])
    scores = own.scores(query, centres.kind)
    here = seen.position[:, taken]
    visible = here + 1 if layer.window is None else jnp.minimum(here + 1, layer.window)

    # `until` counts the members of each cluster up to each entry; the number that a query sees is
    # the difference between its last and its first visible entry.
    member = jax.nn.one_hot(labels, scores.shape[-1])
    until = jnp.cumsum(member, axis=2)
    before_first = jnp.pad(until, ((0, 0), (0, 0), (1, 0), (0, 0)))
    first = jnp.asarray(taken)[None] - visible + 1
    start = jnp.take_along_axis(before_first, first[:, None, :, None], axis=2)
    sees = until[:, :, taken] - start

    def each(x: Array) -> Array:
        """Repeat an array [batch kv_head query _] for every query head of a group."""
        return jnp.repeat(x[:, :, None], group, axis=2).reshape(batch, kv_heads, -1, x.shape[-1])

    order = jnp.argsort(-scores, axis=-1)
    sizes = jnp.take_along_axis(each(sees), order, axis=-1)
    better = jnp.cumsum(sizes, axis=-1) - sizes
    earlier = jnp.take_along_axis(better, jnp.argsort(order, axis=-1), axis=-1)
    # The number of entries that are read before an entry: all entries of clusters with higher
    # scores, and the later entries of its own cluster.
    place = earlier + each(until[:, :, taken])
    index = jnp.broadcast_to(labels[:, :, None], (*place.shape[:3], length))
    own_count = jnp.take_along_axis(until, labels[..., None], axis=3)[..., 0]
    turn = jnp.take_along_axis(place, index, axis=-1) - own_count[:, :, None]
    turn = turn.reshape(batch, kv_heads * group, -1, length)

    heads = seen.weights.reshape(batch, -1, length, length)[:, :, taken]
    total = jnp.maximum(jnp.sum(heads, axis=-1, keepdims=True), 1e-30)
    heads = heads / total
    back = jnp.asarray(taken)[None, :, None] - jnp.arange(length)[None, None]
    inside = ((back >= 0) & (back < visible[..., None]))[:, None]
    ordered = -jnp.sort(-heads, axis=-1)
    mass = jnp.cumsum(ordered, axis=-1)
    last = jnp.minimum(jnp.sum(mass < NEEDED, axis=-1, keepdims=True), length - 1)
    wanted = (heads >= jnp.take_along_axis(ordered, last, axis=-1)) & inside & (heads > 0)

    found: dict[str, list[Array]] = {name: [] for name in MEASURES}
    for share in READS:
        count = jnp.ceil(share * visible).astype(jnp.int32)[:, None, :, None]
        read = (turn < count) & inside
        both = jnp.sum(read & wanted, axis=-1)
        precision, recall = both / count[..., 0], both / jnp.sum(wanted, axis=-1)
        found["captured"].append(jnp.sum(jnp.where(read, heads, 0.0), axis=-1))
        at = jnp.broadcast_to(count - 1, (*heads.shape[:3], 1))
        found["largest"].append(jnp.take_along_axis(mass, at, axis=-1)[..., 0])
        latest = inside & (back[:, None] < count)
        found["latest"].append(jnp.sum(jnp.where(latest, heads, 0.0), axis=-1))
        found["precision"].append(precision)
        found["recall"].append(recall)
        found["f1"].append(2 * both / (count[..., 0] + jnp.sum(wanted, axis=-1)))
    counted = ((seen.segment[:, taken] > 0) & (visible >= LEAST)).astype(jnp.float32)
    sums = {
        name: jnp.einsum("bhqr,bq->hr", jnp.stack(values, axis=-1), counted)
        for name, values in found.items()
    }
    real = (seen.segment > 0).astype(jnp.float32)
    sums["sizes"] = jnp.einsum("bhkc,bk->hc", member, real)
    return sums | {"queries": jnp.sum(counted)}


def _finished(index: int, sums: dict[str, np.ndarray]) -> Prediction:
    queries = float(sums["queries"]) or np.nan
    means = {name: sums[name] / queries for name in MEASURES}
    share = sums["sizes"] / np.maximum(sums["sizes"].sum(axis=1, keepdims=True), 1)
    return Prediction(index, **means, sizes=np.sort(share, axis=1)[:, ::-1])
