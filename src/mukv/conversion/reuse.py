"""Cross-layer reuse: a layer writes the entries that the following ones read (CLA, Brandon et al.
2024).

The layers that read have no projections of keys and values. Their queries and outputs are fitted to
the entries, by maps that commute with the rotation of the positions.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np

from mukv.conversion.base import Conversion, ConvertedLayer, SourceLayer, alike
from mukv.conversion.fits import fit
from mukv.core.errors import BadInput
from mukv.model.plan import ResolvedLayer

Layered = TypeVar("Layered", SourceLayer, ResolvedLayer)


@dataclass(frozen=True)
class CrossLayer(Conversion):
    """Groups of layers that read the entries of their first one.

    layers: number per group, counted among those with the same window and the same kind of entries;
        at 1 nothing changes
    entries: entries of the first layer: the mean over the group, as far as it is linear in the
        layer's input, or its own as before
    """

    layers: int
    entries: Literal["mean", "first"] = "mean"

    def check(self, layers: Sequence[ResolvedLayer]) -> None:
        super().check(layers)
        most = max(map(len, by_kind(layers)))
        if self.layers > most:
            allowed = f"possible with {most} layers of one kind: reuse:1 to reuse:{most}"
            raise BadInput("--to: layers", self.layers, allowed)

    def converted(self, source: Sequence[SourceLayer]) -> list[ConvertedLayer]:
        made: dict[int, ConvertedLayer] = {}
        for same in by_kind(source):
            for start in range(0, len(same), self.layers):
                made |= self.group(same[start : start + self.layers])
        return [made[each.index] for each in source]

    def group(self, layers: Sequence[SourceLayer]) -> dict[int, ConvertedLayer]:
        """Convert the layers of one group; return them by number."""
        first, *others = layers
        orders = [assigned(first, other) for other in others]
        now = first
        if self.entries == "mean" and others:
            now = replace(first, write={**first.write, **mean_entries(layers, orders)})
        own = fitted(first, now) if now is not first else {**first.read}
        made = {first.index: ConvertedLayer(first.attention, own, {**now.write})}
        for other, order in zip(others, orders, strict=True):
            read = other.reordered(fitted(other, now, order), order)
            distance = first.index - other.index
            made[other.index] = ConvertedLayer(other.attention, read, None, distance)
        return made


def by_kind(layers: Sequence[Layered]) -> list[list[Layered]]:
    """Group layers that may read each other's entries: same window and same kind of entries."""
    kinds: dict[Hashable, list[Layered]] = {}
    for layer in layers:
        kinds.setdefault((layer.attention.memory(), layer.window), []).append(layer)
    return list(kinds.values())


def assigned(first: SourceLayer, other: SourceLayer) -> list[int]:
    """Return the KV head of another layer for each of the first one's: the most similar pairs
    first, or in order if each head has its own positions."""
    count = first.attention.kv_heads
    if count == 1 or other.attention.position.biases:
        return list(range(count))
    likeness = alike(first, other)
    found = [0] * count
    for _ in range(count):
        mine, theirs = np.unravel_index(np.argmax(likeness), likeness.shape)
        found[mine] = int(theirs)
        likeness[mine], likeness[:, theirs] = -1, -1
    return found


def fitted(
    reader: SourceLayer, writer: SourceLayer, order: Sequence[int] | None = None
) -> dict[str, Any]:
    """Fit the weights with which a layer reads the entries of another.

    order: the reader's KV head for each of the writer's; None for the same
    """
    places = np.argsort(order) if order is not None else np.arange(reader.attention.kv_heads)
    maps = [
        [
            allowed.fit(entry, wanted)
            for entry, wanted in zip(
                writer.of_examples(name)[places], reader.of_examples(name), strict=True
            )
        ]
        for name, allowed in (("key", reader.key_maps), ("value", reader.value_maps))
    ]
    return reader.reading(*maps)


def mean_entries(
    layers: Sequence[SourceLayer], orders: Sequence[Sequence[int]]
) -> dict[str, np.ndarray]:
    """Fit the weights with which the first layer writes the mean entries of all.

    orders: the KV head of each other layer for each of the first one's
    """
    first, width = layers[0], layers[0].attention.head_dim
    ways = [range(first.attention.kv_heads), *orders]
    made: dict[str, np.ndarray] = {}
    for name, maps in (("key", first.key_maps), ("value", first.value_maps)):
        entries = [
            each.of_examples(name)[list(way)] for each, way in zip(layers, ways, strict=True)
        ]
        means = []
        for members in zip(*entries, strict=True):
            turned = zip(members, maps.turns(members), strict=True)
            means.append(np.mean([member @ turn for member, turn in turned], axis=0))
        target = np.concatenate(means, axis=1)
        source, bias = first.examples, f"{name}_bias"
        if bias in first.write:
            source = np.pad(source, [(0, 0), (0, 1)], constant_values=1)
        found = fit(source, target).reshape(source.shape[1], -1, width)
        made[name] = found[: first.examples.shape[1]]
        if bias in first.write:
            made[bias] = found[-1]
    return made
