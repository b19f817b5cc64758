"""Cluster the keys or queries of every head of a model by k-means, in one pass over a text.

k-means is fitted to the first points; each later batch updates the centres (mini-batch k-means), so
that the arrays held do not grow with the text. Layers whose points have the same shape are
clustered in one call. A layer that reads another layer's entries adds its queries to those of that
layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from mukv.analysis.capture import Captured, CapturedRows, looked_at
from mukv.cache import kmeans
from mukv.cache.calibration import fingerprint
from mukv.cache.centres import (
    Centres,
    Kind,
    LayerCentres,
    unrotated,
)
from mukv.core.compute import Compute, settled
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float
from mukv.model.decoder import Decoder
from mukv.model.plan import ResolvedLayer

START = 64
"""Points per cluster in the sample that k-means is first fitted to."""
POINTS: dict[Kind, tuple[str, ...]] = {
    "keys": ("key",),
    "queries": ("query",),
    "means": ("mean",),
    "aligned": ("key", "query"),
}
"""Captured arrays that each kind clusters; entries are labelled by the centres of the first."""


def calibrate(
    model: Decoder,
    stored: Mapping[str, Any],
    batches: Iterable[CapturedRows],
    kind: Kind,
    clusters: int,
    rotated: bool = True,
    seed: int = 0,
    compute: Compute | None = None,
) -> Centres:
    """Compute the cluster centres of each key head of each layer.

    stored: weights as they are saved, unscaled; the result has their fingerprint, so that
        `load_centres` can refuse other weights
    batches: rows [batch token], all of one shape and without padding
    kind: points to cluster: `keys`, `queries`, `means` (the mean of all keys, weighted by a query's
        attention weights) or `aligned` (keys and queries separately, and a table between them)
    clusters: centres per head
    rotated: whether keys and queries are clustered after their position rotation, not before it
    seed: seed of the initial centres
    compute: settings of the forward pass; None for the defaults of the platform

    Raises BadInput for more clusters than there are points, and for layers whose attention has
    other stores than one entry per token.
    """
    compute = settled(compute)
    weights, batches = model.scaled(stored), list(batches)
    names = POINTS[kind]

    def points(layer: ResolvedLayer, seen: Captured) -> dict[str, Array]:
        own = turned(layer, seen, rotated)
        return {name: _flat(_points(name, own)) for name in names if name != "key" or layer.writes}

    growing = {name: _Growing(clusters, seed) for name in names}
    look, tokens = looked_at(model, points, compute), 0
    for rows in batches:
        tokens += rows.tokens.size
        found = look(weights, rows)
        for name in names:
            growing[name].add(_by_source(model, found, name))
    fits = {name: growing[name].finished() for name in names}
    layers = {index: LayerCentres(centres) for index, centres in fits[names[0]].items()}
    if kind == "aligned":
        layers = {i: replace(layer, query=fits["query"][i]) for i, layer in layers.items()}
        layers = _aligned(model, weights, batches, layers, rotated, compute)
    facts = {"tokens": tokens, "clusters": clusters, "seed": seed}
    return Centres(kind, rotated, fingerprint(stored), layers, facts)


def turned(layer: ResolvedLayer, seen: Captured, rotated: bool) -> Captured:
    """Return the captured queries and keys, with the position rotation undone unless `rotated`."""
    if rotated:
        return seen
    batch, heads, group, length, width = seen.query.shape
    query = seen.query.reshape(batch, heads * group, length, width)
    position = seen.position[:, None]
    query = unrotated(layer.softmax, query, position).reshape(seen.query.shape)
    return replace(seen, query=query, key=unrotated(layer.softmax, seen.key, position))


def _points(name: str, seen: Captured) -> Float[Array, "batch kv_heads *_ width"]:
    if name == "mean":
        total = jnp.maximum(jnp.sum(seen.weights, axis=-1, keepdims=True), 1e-30)
        return jnp.einsum("bhgqk,bhkd->bhgqd", seen.weights / total, seen.key)
    return seen.query if name == "query" else seen.key


def _flat(points: Float[Array, "batch kv_heads *_ width"]) -> Float[Array, "kv_heads point width"]:
    heads, width = points.shape[1], points.shape[-1]
    return jnp.moveaxis(points, 1, 0).reshape(heads, -1, width)


def _by_source(model: Decoder, found: Mapping[int, Any], name: str) -> dict[int, Array]:
    """Concatenate the points of all layers that read the same entries, by the layer that writes
    these entries."""
    gathered: dict[int, list[Array]] = {}
    for layer in model.layers:
        if name in found[layer.index]:
            gathered.setdefault(layer.source, []).append(found[layer.index][name])
    return {source: jnp.concatenate(each, axis=1) for source, each in gathered.items()}


class _Growing:
    """Running k-means of all layers. Layers whose points have the same shape share one fit."""

    def __init__(self, clusters: int, seed: int):
        self.clusters, self.seed = clusters, seed
        self.waiting: list[dict[int, Array]] = []
        self.fits: dict[tuple[int, ...], kmeans.Fit] = {}

    def add(self, points: dict[int, Array]) -> None:
        """Update the centres with points [kv_heads point width] by layer. The first batches are
        collected until there are START points per cluster."""
        if self.fits:
            for layers, stacked in _stacked(points).items():
                self.fits[layers] = kmeans.absorb(self.fits[layers], stacked)
            return
        self.waiting.append(points)
        fewest = min(each.shape[1] for each in points.values()) * len(self.waiting)
        if fewest >= START * self.clusters:
            self._start()

    def _start(self) -> None:
        first = self.waiting[0]
        sample = {
            index: jnp.concatenate([points[index] for points in self.waiting], axis=1)
            for index in first
        }
        self.waiting.clear()
        for layers, stacked in _stacked(sample).items():
            self.fits[layers] = kmeans.fit(stacked, self.clusters, self.seed)

    def finished(self) -> dict[int, Float[Array, "kv_heads cluster width"]]:
        """Return the centres by layer."""
        if not self.fits:
            self._start()
        return {
            index: centres
            for layers, fit in self.fits.items()
            for index, centres in zip(layers, jnp.split(fit.centres, len(layers)), strict=True)
        }


def _stacked(points: Mapping[int, Array]) -> dict[tuple[int, ...], Array]:
    """Concatenate the points of layers of the same shape along the head axis.

    Returns [layers * kv_heads, point, width] by the numbers of these layers.
    """
    alike: dict[tuple[int, ...], list[int]] = {}
    for index, each in points.items():
        alike.setdefault(each.shape, []).append(index)
    return {
        tuple(layers): jnp.concatenate([points[index] for index in layers])
        for layers in alike.values()
    }


def _aligned(
    model: Decoder,
    weights: Any,
    batches: Iterable[CapturedRows],
    layers: Mapping[int, LayerCentres],
    rotated: bool,
    compute: Compute,
) -> dict[int, LayerCentres]:
    """Add to the centres the table of logarithms of the mean attention weight between each cluster
    of queries and each cluster of keys. This takes a second pass over the batches."""

    def reduction(layer: ResolvedLayer, seen: Captured) -> dict[str, Array]:
        own, centres = turned(layer, seen, rotated), layers[layer.source]
        assert centres.query is not None
        heads, count = centres.query.shape[:2]
        query = own.query.reshape(len(own.query), heads, -1, own.query.shape[-1])
        asks = jax.nn.one_hot(kmeans.nearest(query, centres.query), count)
        asks = asks.reshape(*own.query.shape[:-1], count)
        entry = jax.nn.one_hot(centres.labels(own.key, "aligned"), centres.key.shape[1])
        seen_of = (own.weights > 0).astype(jnp.float32)

        def between(pairs: Array) -> Array:
            to_entries = jnp.einsum("bhgqk,bhkc->bhgqc", pairs, entry)
            return jnp.einsum("bhgqc,bhgqa->hac", to_entries, asks)

        return {"mass": between(own.weights), "pairs": between(seen_of)}

    look = looked_at(model, reduction, compute)
    total: dict[int, Any] = {}
    for rows in batches:
        for index, sums in look(weights, rows).items():
            source = model.layers[index].source
            old = total.get(source)
            total[source] = sums if old is None else jax.tree.map(jnp.add, old, sums)
    # A pair of clusters that never occurred is given the smallest observed mean, less 1.
    return {
        index: replace(layer, table=_logarithm(total[index]["mass"], total[index]["pairs"]))
        for index, layer in layers.items()
    }


def _logarithm(mass: Array, pairs: Array) -> Array:
    known = (pairs > 0) & (mass > 0)
    mean = jnp.where(known, jnp.log(jnp.where(known, mass, 1.0) / jnp.maximum(pairs, 1.0)), 0.0)
    return jnp.where(known, mean, jnp.min(jnp.where(known, mean, 0.0)) - 1.0)


def check(clusters: int, tokens: int) -> None:
    """Raise BadInput for a number of clusters that can't be calibrated from so many tokens."""
    if clusters < 2:
        raise BadInput("--clusters", clusters, "at least 2")
    if clusters > tokens:
        raise BadInput("--clusters", clusters, f"at most the number of tokens ({tokens:,})")
