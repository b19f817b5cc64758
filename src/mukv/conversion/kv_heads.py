"""Fewer KV heads: each is the mean of the projections of several.

Ainslie et al. 2023 (GQA, section 2.1) take the mean of neighbours. Jin et al. 2024 (Align Attention
Heads Before Merging Them) merge similar heads, and first rotate their keys and values so that they
agree; queries and output are rotated accordingly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from mukv.attention import Grouped
from mukv.conversion.base import Conversion, ConvertedLayer, Misfit, SourceLayer, alike
from mukv.conversion.rotary import NONE, Maps, Matrix
from mukv.core.typing import Float


@dataclass(frozen=True)
class FewerHeads(Conversion):
    """Grouped-query attention with fewer KV heads.

    kv_heads: their number, which divides that of the model; equal to it, nothing changes
    by: which heads are merged: neighbours, by the plain mean; or those with similar keys and
        values, which are first rotated to agree
    """

    kv_heads: int
    by: Literal["neighbours", "similarity"] = "neighbours"

    @property
    def uses_examples(self) -> bool:
        return self.by == "similarity"

    def excess(self, attention: Grouped) -> Iterator[tuple[str, str]]:
        number = attention.kv_heads
        if number % self.kv_heads:
            parts = [f"gqa:{n}" for n in range(1, number + 1) if number % n == 0]
            yield "kv_heads", f"possible with {number} KV heads: {', '.join(parts)}"

    def misfits(self, attention: Grouped) -> Iterator[Misfit]:
        if self.by == "similarity" and attention.position.biases:
            allowed = "rope or nope, or gqa without by=similarity: heads keep their order"
            yield "position", attention.position.kind, allowed

    def converted_layer(self, source: SourceLayer) -> ConvertedLayer:
        groups = self.groups(source)
        similar = self.by == "similarity"
        write, read = {**source.write}, []
        for name, maps in (("key", source.key_maps), ("value", source.value_maps)):
            turns, back = aligned(source.of_examples(name), groups, maps if similar else NONE)
            for weight in (name, f"{name}_bias"):
                if weight in write:
                    heads = np.moveaxis(source.weight(weight), -2, 0)
                    means = [np.mean([heads[h] @ turns[h] for h in g], axis=0) for g in groups]
                    write[weight] = np.stack(means, axis=-2)
            read.append(back)
        order = [head for group in groups for head in group]
        made = replace(source.attention, kv_heads=self.kv_heads)
        return ConvertedLayer(made, source.reordered(source.reading(*read), order), write)

    def groups(self, source: SourceLayer) -> list[list[int]]:
        """Return the KV heads that are merged, by group."""
        number = source.attention.kv_heads
        groups = np.arange(number).reshape(self.kv_heads, -1)
        if self.by == "similarity" and 1 < self.kv_heads < number:
            groups = best_groups(alike(source, source), groups)
        return groups.tolist()


def aligned(
    heads: Float[np.ndarray, "heads example width"], groups: list[list[int]], maps: Maps
) -> tuple[list[Matrix], list[Matrix]]:
    """Return the map of each head to the mean of its group, and the map of that mean to each
    head."""
    turns, back = [np.eye(heads.shape[-1])] * len(heads), [np.eye(heads.shape[-1])] * len(heads)
    for group in groups:
        if len(group) > 1:
            found = maps.turns([heads[head] for head in group])
            mean = np.mean([heads[h] @ t for h, t in zip(group, found, strict=True)], axis=0)
            for head, turn in zip(group, found, strict=True):
                turns[head], back[head] = turn, maps.fit(mean, heads[head])
    return turns, back


def best_groups(
    likeness: Float[np.ndarray, "heads heads"], groups: np.ndarray
) -> Float[np.ndarray, "group member"]:
    """Exchange heads between groups of equal size while this increases the similarity in groups."""
    groups = groups.copy()

    def total(grouping: np.ndarray) -> float:
        return sum(float(likeness[np.ix_(group, group)].sum()) for group in grouping)

    def exchanged(one: tuple[int, ...], other: tuple[int, ...]) -> np.ndarray:
        changed = groups.copy()
        changed[one], changed[other] = groups[other], groups[one]
        return changed

    places = list(np.ndindex(*groups.shape))
    swaps = [(one, other) for one in places for other in places if one[0] < other[0]]
    while swaps:
        best = max((exchanged(*swap) for swap in swaps), key=total)
        if total(best) <= total(groups) + 1e-9:
            break
        groups = best
    return np.sort(groups, axis=1)
