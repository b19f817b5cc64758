"""Rules between our weights and the tensors of a checkpoint, in both directions.

A rule names a tensor of theirs, a weight of ours, and how the axes of the one merge the named
dimensions of the other, as in einops: "(heads head_dim) embed". Shapes, reshapes, transposes and
the slice of a file that a device needs follow from these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mukv.core.errors import BadInput, nearest_name
from mukv.core.params import LAYER, Param, named
from mukv.model import Decoder
from mukv.model.plan import ResolvedLayer
from mukv.storage.tensors import Cut, Tensor

OURS_FIRST = re.compile(r"^stage\d+\.slot\d+\.")
TURNED = frozenset(
    f"{place}{kind}"
    for place in ("read.query", "write.key")
    for kind in ("", "_bias", "_norm.gain", "_norm.offset")
)
"""Weights whose last dimension is that of a rotated head."""


class WeightSource(Protocol):
    """Where tensors are read from: `TensorFiles`, or another format that looks like it."""

    tensors: dict[str, Tensor]

    def read(self, name: str, cut: Cut) -> np.ndarray: ...


@dataclass(frozen=True)
class Rule:
    """theirs: "{layer}" stands for the layer's number. ours: path in a layer, or outside of all.
    axes: for each axis of theirs the dimensions of ours that it merges.
    """

    theirs: str
    ours: str
    axes: str

    def merged(self) -> tuple[tuple[str, ...], ...]:
        found = re.findall(r"\(([^)]*)\)|(\S+)", self.axes)
        return tuple(tuple((group or single).split()) for group, single in found)


@dataclass(frozen=True)
class WeightPiece:
    """One tensor of theirs, and the weight of ours that it is, or a layer of a stacked one.

    param: not stacked. repeat: place in the stack; None outside of the layers. order: where each
    of our head's dimensions is in theirs; None for the same order.
    """

    theirs: str
    ours: str
    repeat: int | None
    param: Param
    axes: tuple[tuple[str, ...], ...]
    order: tuple[int, ...] | None = None

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Of theirs."""
        dims = self.param.dims
        return tuple(math.prod(dims[name] for name in group) for group in self.axes)

    @property
    def _flat(self) -> list[str]:
        return [name for group in self.axes for name in group]

    def read(self, source: WeightSource, cut: Cut | None = None) -> np.ndarray:
        """Ours, or a slice of it; of a file no more is read than the slice needs, where it
        is one of whole rows or heads."""
        dims = self.param.dims
        whole = dict(zip(dims, cut or (), strict=False))
        bounds = {name: whole.get(name, slice(None)).indices(size) for name, size in dims.items()}
        theirs, shape = [], []
        for first, *rest in self.axes:
            start, stop, _ = bounds[first]
            inner = math.prod(dims[name] for name in rest)
            theirs.append(slice(start * inner, stop * inner))
            shape += [stop - start, *(dims[name] for name in rest)]
        found = source.read(self.theirs, tuple(theirs)).reshape(shape)
        found = found.transpose([self._flat.index(name) for name in dims])
        if self.order is not None:
            found = found[..., np.asarray(self.order)]
        later = {name for _, *rest in self.axes for name in rest}
        inside = tuple(slice(*bounds[name]) if name in later else slice(None) for name in dims)
        return found[inside]

    def give(self, weight: np.ndarray) -> np.ndarray:
        """Theirs, from all of ours."""
        if self.order is not None:
            weight = weight[..., np.argsort(self.order)]
        names = list(self.param.dims)
        return weight.transpose([names.index(name) for name in self._flat]).reshape(self.shape)


def pieces(
    rules: Sequence[Rule], model: Decoder, order: Callable[[int], Sequence[int]] | None = None
) -> list[WeightPiece]:
    """Every tensor that a model of this kind has, by our names in order.

    order: where each dimension of a rotated head of ours is in theirs, by the head's width; None
    for the same order. Raises BadInput for a weight that no rule knows.
    """
    by_ours = {rule.ours: rule for rule in rules}
    by_slot: dict[str, list[ResolvedLayer]] = {}
    for layer in model.layers:
        by_slot.setdefault(f"stage{layer.stage}.slot{layer.slot}.", []).append(layer)
    found = []
    for name, param in named(model.params()).items():
        inside = OURS_FIRST.sub("", name)
        rule = by_ours.get(inside)
        if rule is None:
            raise BadInput(f"model: {name}", list(param.shape), "this weight has no name in theirs")
        single = Param({k: v for k, v in param.dims.items() if k != LAYER})
        turned = tuple(order(param.shape[-1])) if order and inside in TURNED else None
        shared = (single, rule.merged(), turned)
        if inside == name:
            found.append(WeightPiece(rule.theirs, name, None, *shared))
            continue
        for layer in by_slot[name.removesuffix(inside)]:
            theirs = rule.theirs.format(layer=layer.index)
            found.append(WeightPiece(theirs, name, layer.repeat, *shared))
    return found


def halves_in_pairs(width: int) -> list[int]:
    """Where the dimensions of a head that is rotated in halves are in one in interleaved pairs."""
    return [*range(0, width, 2), *range(1, width, 2)]


def pairs_in_halves(width: int) -> list[int]:
    """The inverse."""
    return np.argsort(halves_in_pairs(width)).tolist()


def check(
    found: Iterable[WeightPiece], source: WeightSource, where: str, ignored: str = "$^"
) -> None:
    """Raise BadInput unless every tensor is there, has its shape, and none is left over.

    ignored: a pattern of names that nothing depends on.
    """
    wanted = {piece.theirs: piece.shape for piece in found}
    for name, shape in wanted.items():
        there = source.tensors.get(name)
        if there is None:
            near = nearest_name(name, source.tensors.keys() - wanted.keys())
            raise BadInput(f"{where}: {name}", "missing", "the configuration asks for it", near)
        if there.shape != shape:
            allowed = f"the configuration asks for {list(shape)}"
            raise BadInput(f"{where}: {name}", list(there.shape), allowed)
    for name, there in source.tensors.items():
        if name not in wanted and not re.search(ignored, name):
            allowed = "the configuration asks for no such tensor"
            raise BadInput(f"{where}: {name}", list(there.shape), allowed)


def grouped_by_weight(found: Iterable[WeightPiece]) -> dict[str, list[WeightPiece]]:
    """The pieces of each weight of ours, in the order of the stack."""
    groups: dict[str, list[WeightPiece]] = {}
    for piece in found:
        groups.setdefault(piece.ours, []).append(piece)
    return groups


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """A tree from dotted names."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
