"""Clusters: score one centre per cluster of keys, and read the entries of the best clusters.

Clusters are read in order of their score until the budget is spent. Centres are fitted to the
prompt's keys (ClusterKV, Liu et al. 2024; Squeezed Attention, Hooper et al. 2024), or calibrated
once per model (`centres.py`). The body is sorted by cluster, so that each cluster is a contiguous
run. Entries that are always read come first.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.attention import Query, Recall, Retrieved
from mukv.cache import kmeans
from mukv.cache.centres import Kind, LayerCentres
from mukv.cache.select import Index, Select, View, joined, shares
from mukv.cache.shelf import Shelf
from mukv.core.broadcast import with_rank
from mukv.core.counts import require_counts
from mukv.core.linear import similarity
from mukv.core.typing import Array, Bool, Float, Int

ITERATIONS, PER_CLUSTER = 5, 16
"""Iterations of k-means, and number of keys per cluster that it is fitted to."""


@dataclass(frozen=True)
class Clusters(Select):
    """Read the entries of the clusters with the highest scores (ClusterKV, Liu et al. 2024).

    clusters: centres per head; None means about the root of the number of entries
    calibrated: kind of the model's calibrated centres; None fits centres to the prompt
    """

    clusters: int | None = None
    calibrated: Kind | None = None

    orders: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_counts(self, "clusters", most=1 << 20)

    def order(self, view: View) -> tuple[Int[Array, "batch stores slot"], View]:
        batch, stores, slots = view.there.shape
        # Heads that share a store are clustered together, by their concatenated keys.
        key = view.key.reshape(batch, stores, -1, *view.key.shape[2:]).swapaxes(2, 3)
        key = key.reshape(batch, stores, slots, -1)
        centres = self._centres(key, view)
        if self.calibrated:
            label = LayerCentres(**centres).labels(key, self.calibrated)
        else:
            label = kmeans.nearest(key, centres["key"])
        count = centres["key"].shape[-2]
        label = jnp.where(view.always(), 0, label + 1)
        label = jnp.where(view.there, label, count + 1)
        order = jnp.argsort(label, axis=-1)
        first = with_rank(jnp.arange(count + 2)[:, None], label.ndim + 1)
        start = jnp.sum(label[..., None, :] < first, axis=-1).astype(jnp.int32)
        return order, replace(view, before={**centres, "start": start})

    def index(self, view: View) -> dict[str, Array]:
        return dict(view.before)

    def _centres(
        self, key: Float[Array, "batch stores slot width"], view: View
    ) -> dict[str, Array]:
        before = {name: array for name, array in view.before.items() if name != "start"}
        if self.calibrated or not view.fresh:
            return before
        number = self.clusters or max(round(math.sqrt(key.shape[2])), 1)
        return {"key": _fitted(key, view.there, min(number, key.shape[2]))}

    def retrieve(self, shelf: Shelf, index: Index, query: Query, recall: Recall) -> Retrieved:
        start = index["start"]
        whole = joined(query)
        batch, heads, _, width = whole.shape
        if self.calibrated:
            parts = {name: array for name, array in index.items() if name != "start"}
            logits = LayerCentres(**parts).scores(whole, self.calibrated)
        else:
            centres = index["key"].reshape(
                batch, start.shape[1], -1, heads // start.shape[1], width
            )
            centres = centres.swapaxes(2, 3).reshape(batch, heads, -1, width)
            logits = similarity(whole, centres)
        size = jnp.diff(start, axis=-1)
        wanted = shares(logits, size[..., 1:] > 0)
        wanted = jnp.concatenate([jnp.full_like(wanted[..., :1], jnp.inf), wanted], axis=-1)
        rank = jnp.argsort(wanted, axis=-1, descending=True)
        first = jnp.take_along_axis(start[..., :-1], rank, axis=-1)
        size = jnp.take_along_axis(size, rank, axis=-1)
        number = min(self.budget.of(shelf.slots), shelf.slots)
        slots = jax.vmap(jax.vmap(partial(_filled, number=number)))(first, size)
        entries = shelf.runs(slots)
        return recall(entries), entries


def _filled(
    first: Int[Array, " cluster"], size: Int[Array, " cluster"], number: int
) -> Int[Array, " chosen"]:
    """Return the slots of the clusters one after another, `number` in total."""
    end = jnp.cumsum(size)
    place = jnp.arange(number)
    cluster = jnp.searchsorted(end, place, side="right")
    found = jnp.minimum(cluster, len(end) - 1)
    slot = first[found] + place - (end - size)[found]
    # After the last cluster all slots are empty.
    return jnp.where(cluster < len(end), slot, place)


def _fitted(
    key: Float[Array, "batch stores slot width"],
    there: Bool[Array, "batch stores slot"],
    clusters: int,
) -> Float[Array, "batch stores cluster width"]:
    """Fit k-means to an evenly spaced sample of the keys, starting from evenly spaced keys."""
    batch, stores, slots, width = key.shape
    sample = min(slots, PER_CLUSTER * clusters)
    count = jnp.sum(there, axis=-1, keepdims=True)
    place = (jnp.arange(sample)[None, None] * count) // sample
    points = jnp.take_along_axis(key, place[..., None], axis=2).astype(jnp.float32)
    points = points.reshape(batch * stores, sample, width)
    start = points[:, jnp.arange(clusters) * sample // clusters]
    centres = kmeans.lloyd(points, start, ITERATIONS, 0.0).centres
    return centres.reshape(batch, stores, clusters, width).astype(key.dtype)
