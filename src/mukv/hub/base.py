"""Rules that map our weights to the tensors of a checkpoint, in both directions.

A rule has the name of a tensor of the checkpoint ("theirs"), the name of our weight ("ours"), and
the named dimensions of our weight that each axis of the tensor merges, as in einops:
"(heads head_dim) embed". Shapes, reshapes, transposes and the slice of a file that a device needs
follow from these.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np

from mukv.attention import Attention
from mukv.core.errors import BadInput, nearest_name
from mukv.core.params import LAYER, Param, named
from mukv.model import Decoder
from mukv.model.plan import ResolvedLayer
from mukv.storage.tensors import Cut, Tensor

BLOCK_BYTES = 1 << 26
"""Maximum bytes of a weight that are read at once, if it can be read in blocks of rows."""
EXPERTS, EXPERT = "experts", "{expert}"
"""Name of the axis that counts experts, and what stands for the index of one in a rule."""
PART = "part"
"""Name, in the axes of a rule, of the axis that counts the weights that a tensor holds."""
OURS_FIRST = re.compile(r"^stage\d+\.slot\d+\.")
ROTATED = frozenset(
    f"{place}{kind}"
    for place in ("read.query", "write.key")
    for kind in ("", "_bias", "_norm.gain", "_norm.offset")
)
"""Weights of attention whose last dimensions are the rotated ones of a head, if their last axis is
one of HEAD."""
HEAD = ("head_dim", "query_dim", "rope_dim")


class WeightSource(Protocol):
    """A source of tensors: `TensorFiles`, or another format with the same interface."""

    tensors: dict[str, Tensor]

    def read(self, name: str, cut: Cut) -> np.ndarray: ...


class TensorRows(NamedTuple):
    """Rows of a tensor, along its first axis.

    places: index of each row
    total: number of rows of the tensor
    """

    places: tuple[int, ...]
    total: int


def blocks(sizes: Sequence[int], number: int, groups: int) -> TensorRows:
    """Return the rows of one block of each group of a tensor.

    sizes: rows of the blocks of a group. number: index of the block. groups: number of groups
    """
    total, start = sum(sizes), sum(sizes[:number])
    inside = range(start, start + sizes[number])
    return TensorRows(
        tuple(group * total + row for group in range(groups) for row in inside), groups * total
    )


@dataclass(frozen=True)
class Rule:
    """Maps one tensor of a checkpoint to one of our weights.

    theirs: name of the tensor; "{layer}" stands for the layer's index, "{expert}" for the index of
        an expert that has a tensor of its own
    ours: dotted path of our weight, inside its layer if it belongs to one
    axes: for each axis of the tensor, the dimensions of our weight that it merges; "part" counts
        the weights that a tensor holds, as in "(part heads head_dim)"; "()" is an axis of size one
    part: index of this weight in a tensor that holds several, and their number
    rows: function of the layer's mixer that returns the rows of the tensor that hold this weight,
        in our order, and their number in the tensor; None for all rows
    kind: class of the mixers whose weight it is, if others have one of this name; None for all
    """

    theirs: str
    ours: str
    axes: str
    part: tuple[int, int] = (0, 1)
    rows: Callable[[Any], TensorRows] | None = None
    kind: type[Any] | None = None

    @property
    def dims(self) -> frozenset[str]:
        """Names of the dimensions of our weight. Weights of the same name in layers of different
        kinds differ in them."""
        found = {name for group in self.merged() for name in group} - {PART}
        return frozenset(found | {EXPERTS} if EXPERT in self.theirs else found)

    def merged(self) -> tuple[tuple[str, ...], ...]:
        """Return the dimensions of our weight that each axis of the tensor merges."""
        groups = re.findall(r"\(([^)]*)\)|([^\s()]+)", self.axes)
        return tuple(tuple((group or single).split()) for group, single in groups)


@dataclass(frozen=True)
class WeightPiece:
    """One tensor of a checkpoint, and our weight (or the piece of a stacked weight) that it holds.

    theirs, ours: names of the tensor and of our weight
    place: index of the piece in our weight: () for a weight outside of layers, (repeat,) for that
        of a layer, (repeat, expert) for that of an expert
    param: declaration of the piece
    axes: for each axis of the tensor, the dimensions of our weight that it merges
    order: for each dimension of a head of our weight, its index in a head of the tensor; None for
        the same order
    part: index of our weight in the tensor, and the number of weights there
    rows: rows of the tensor that hold our weight; None for all
    """

    theirs: str
    ours: str
    place: tuple[int, ...]
    param: Param
    axes: tuple[tuple[str, ...], ...]
    order: tuple[int, ...] | None = None
    part: tuple[int, int] = (0, 1)
    rows: TensorRows | None = None

    @cached_property
    def _dims(self) -> dict[str, int]:
        return {**self.param.dims, PART: self.part[1]}

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor in the checkpoint."""
        dims = self._dims
        sizes = tuple(math.prod(dims[name] for name in group) for group in self.axes)
        return sizes if self.rows is None else (self.rows.total, *sizes[1:])

    @property
    def _flat(self) -> list[str]:
        return [name for group in self.axes for name in group]

    def read(self, source: WeightSource, cut: Cut | None = None) -> np.ndarray:
        """Read our weight, or a slice of it. If the slice consists of whole rows or heads, nothing
        else is read from the file; a tensor of which our weight is some of the rows is read whole.
        """
        if self.rows is not None:
            taken = source.read(self.theirs, ())[list(self.rows.places)]
            weight = taken.reshape([self._dims[name] for name in self._flat])
            weight = weight.transpose([self._flat.index(name) for name in self.param.dims])
            return weight[cut] if cut else weight
        dims, index = self._dims, self.part[0]
        whole = dict(zip(self.param.dims, cut or (), strict=False)) | {
            PART: slice(index, index + 1)
        }
        bounds = {name: whole.get(name, slice(None)).indices(size) for name, size in dims.items()}
        theirs, shape = [], []
        for first, *rest in self.axes:
            start, stop, _ = bounds[first]
            inner = math.prod(dims[name] for name in rest)
            theirs.append(slice(start * inner, stop * inner))
            shape += [stop - start, *(dims[name] for name in rest)]
        weight = source.read(self.theirs, tuple(theirs)).reshape(shape)
        weight = weight.transpose([self._flat.index(name) for name in dims if name in self._flat])
        later = {name for _, *rest in self.axes for name in rest}
        if PART in self._flat:
            weight = weight[..., index if PART in later else 0]
        if self.order is not None:
            weight = weight[..., np.asarray(self.order)]
        ours = self.param.dims
        return weight[tuple(slice(*bounds[n]) if n in later else slice(None) for n in ours)]

    def blocks(self, source: WeightSource) -> Iterator[np.ndarray]:
        """Yield our weight in blocks of rows if its rows are consecutive in the file, else as a
        whole, so that a large embedding is never in RAM as a whole.
        """
        dims = self.param.dims
        first = next(iter(dims))
        rows = dims[first]
        row_bytes = self.param.size // rows * source.tensors[self.theirs].dtype.itemsize
        step = max(1, BLOCK_BYTES // max(row_bytes, 1))
        reordered = self.order is not None or PART in self._flat or self.rows is not None
        if self.axes[0][0] != first or reordered or step >= rows:
            yield self.read(source)
            return
        for start in range(0, rows, step):
            yield self.read(source, (slice(start, min(start + step, rows)),))

    def put(self, weight: np.ndarray, into: np.ndarray) -> None:
        """Write our whole weight to its part of the tensor of the checkpoint.

        into: the tensor, contiguous
        """
        if self.rows is not None:
            into[list(self.rows.places)] = self._turned(weight).reshape(-1, *into.shape[1:])
            return
        view = into.reshape([self._dims[name] for name in self._flat])
        place = [self.part[0] if name == PART else slice(None) for name in self._flat]
        view[tuple(place)] = self._turned(weight)

    def _turned(self, weight: np.ndarray) -> np.ndarray:
        """Return our weight with its axes in the order of the tensor of the checkpoint."""
        if self.order is not None:
            weight = weight[..., np.argsort(self.order)]
        names = list(self.param.dims)
        return weight.transpose([names.index(name) for name in self._flat if name != PART])


def pieces(
    rules: Sequence[Rule], model: Decoder, order: Callable[[int], Sequence[int]] | None = None
) -> list[WeightPiece]:
    """Return a piece for every tensor of a model, in the order of our weights.

    order: function from the number of rotated dimensions of a head to their `order`; None for the
        same order

    Raises BadInput for a weight without a rule.
    """
    by_ours = {(rule.ours, rule.dims, rule.kind): rule for rule in rules}
    by_slot: dict[str, list[ResolvedLayer]] = {}
    for layer in model.layers:
        by_slot.setdefault(f"stage{layer.stage}.slot{layer.slot}.", []).append(layer)
    found = []
    for name, param in named(model.params()).items():
        inside, dims = OURS_FIRST.sub("", name), frozenset(param.dims) - {LAYER}
        layers = by_slot.get(name.removesuffix(inside), [])
        kind = type(layers[0].attention) if layers else None
        rule = by_ours.get((inside, dims, kind)) or by_ours.get((inside, dims, None))
        if rule is None:
            raise BadInput(
                f"model: {name}", list(param.shape), "this weight has no name in their format"
            )
        apart = {LAYER, EXPERTS} if EXPERT in rule.theirs else {LAYER}
        single = Param({k: v for k, v in param.dims.items() if k not in apart})
        indices = None
        if order and inside in ROTATED and list(single.dims)[-1] in HEAD:
            mixer = layers[0].attention
            if isinstance(mixer, Attention):
                still = param.shape[-1] - mixer.rotated_dim
                turned = (still + place for place in order(mixer.rotated_dim))
                indices = (*range(still), *turned)
        shared = (single, rule.merged(), indices, rule.part)
        if inside == name:
            found.append(WeightPiece(rule.theirs, name, (), *shared))
            continue
        experts = range(param.dims[EXPERTS]) if EXPERT in rule.theirs else (None,)
        for layer in layers:
            rows = rule.rows(layer.attention) if rule.rows else None
            for expert in experts:
                theirs = rule.theirs.format(layer=layer.index, expert=expert)
                place = (layer.repeat,) if expert is None else (layer.repeat, expert)
                found.append(WeightPiece(theirs, name, place, *shared, rows))
    return found


def halves_in_pairs(width: int) -> list[int]:
    """Return, for each dimension of a head whose halves are rotated as pairs, its index in a head
    with interleaved pairs.
    """
    return [*range(0, width, 2), *range(1, width, 2)]


def pairs_in_halves(width: int) -> list[int]:
    """Return the inverse of `halves_in_pairs`."""
    return np.argsort(halves_in_pairs(width)).tolist()


def check(
    found: Iterable[WeightPiece], source: WeightSource, where: str, ignored: str = "$^"
) -> None:
    """Raise BadInput unless the source has exactly the tensors of these pieces, with their shapes.

    ignored: pattern of the names of further tensors that may be present
    """
    wanted = {piece.theirs: piece.shape for piece in found}
    for name, shape in wanted.items():
        tensor = source.tensors.get(name)
        if tensor is None:
            near = nearest_name(name, source.tensors.keys() - wanted.keys())
            raise BadInput(f"{where}: {name}", "missing", "the configuration asks for it", near)
        if tensor.shape != shape:
            allowed = f"the configuration asks for {list(shape)}"
            raise BadInput(f"{where}: {name}", list(tensor.shape), allowed)
    for name, tensor in source.tensors.items():
        if name not in wanted and not re.search(ignored, name):
            allowed = "the configuration asks for no such tensor"
            raise BadInput(f"{where}: {name}", list(tensor.shape), allowed)


def grouped_by_weight(found: Iterable[WeightPiece]) -> dict[str, list[WeightPiece]]:
    """Group the pieces by our weight, each group in the order of the stack."""
    groups: dict[str, list[WeightPiece]] = {}
    for piece in found:
        groups.setdefault(piece.ours, []).append(piece)
    return groups


def together(
    parts: Sequence[WeightPiece], source: WeightSource, cut: Cut | None = None
) -> np.ndarray:
    """Read the weight of one layer, or a slice of it, from its piece or from those of its
    experts."""
    if not parts[0].place[1:]:
        return parts[0].read(source, cut)
    first, *rest = cut or (slice(None),)
    return np.stack([part.read(source, tuple(rest)) for part in parts[first]])


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Make a nested dict from dotted names."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree
