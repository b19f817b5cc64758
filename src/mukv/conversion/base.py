"""The interface of conversions: a grouped-query decoder becomes one with a smaller memory.

A conversion is a pure function of configuration and weights (NumPy, float64). It receives examples
of the inputs of each layer's attention, and is fitted to these.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from mukv.attention import AnyAttention, Grouped
from mukv.conversion.fits import Matrix
from mukv.conversion.rotary import ANY, NONE, Maps, RotatedPairs, commuting, cosine, pairs_of
from mukv.core.errors import BadInput
from mukv.core.params import Param, map_params
from mukv.core.typing import Float
from mukv.model.plan import ResolvedLayer

Misfit = tuple[str, object, str]
"""A field that prevents a conversion, its value, and what would be possible."""


@dataclass(frozen=True)
class SourceLayer:
    """The attention of one layer that is to be converted.

    index: number of the layer
    attention: its configuration, with the position that the plan gives it
    window: tokens that a query sees, itself included; None for all
    read, write: its weights
    examples: inputs of the attention, after the norm, float32
    length: tokens of the rows that the model is meant for
    """

    index: int
    attention: Grouped
    window: int | None
    read: Mapping[str, Any]
    write: Mapping[str, Any]
    examples: Float[np.ndarray, "example embed"]
    length: int

    def weight(self, name: str) -> np.ndarray:
        """Return a weight by its name, as float64."""
        return wide((self.write if name in self.write else self.read)[name])

    def of_examples(self, name: str) -> Float[np.ndarray, "heads example head_dim"]:
        """Compute queries, keys or values of the examples, before norms and rotation: float64."""
        # Float32 halves the time, and the results are only used in sums over many examples.
        made = np.tensordot(self.examples, self.weight(name).astype(np.float32), 1)
        if name in self.attention.biases:
            made = made + self.weight(f"{name}_bias")
        return wide(made.swapaxes(0, 1))

    @property
    def pairs(self) -> RotatedPairs:
        """The dimensions of a key that are rotated."""
        return pairs_of(self.attention.position, self.attention.head_dim)

    @property
    def key_maps(self) -> Maps:
        """The maps of a head's keys that its queries can invert."""
        return NONE if self.attention.norm else commuting(self.pairs)

    @property
    def value_maps(self) -> Maps:
        """The maps of a head's values that the output projection can invert."""
        return NONE if self.attention.gate == "channel" else ANY

    @property
    def group(self) -> int:
        """Number of query heads per KV head."""
        return self.attention.heads // self.attention.kv_heads

    @property
    def reach(self) -> int:
        """Maximum number of tokens that a query sees."""
        return min(self.window or self.length, self.length)

    def reading(self, keys: Sequence[Matrix], values: Sequence[Matrix]) -> dict[str, Any]:
        """Return the weights that read entries from which these matrices give the keys and values
        of each KV head: key = entry K, value = entry V."""
        read = dict(self.read)
        owners = [head // self.group for head in range(self.attention.heads)]
        back = np.stack([keys[owner].T for owner in owners])
        for weight in ("query", "query_bias"):
            if weight in read:
                read[weight] = np.einsum("...hd,hde->...he", self.weight(weight), back)
        forth = np.stack([values[owner] for owner in owners])
        read["output"] = np.einsum("hdv,hve->hde", forth, self.weight("output"))
        return read

    def reordered(self, read: Mapping[str, Any], order: Sequence[int]) -> dict[str, Any]:
        """Return the weights for reading with the KV heads, and their query heads, in another
        order."""
        heads = np.arange(self.attention.heads).reshape(-1, self.group)[list(order)].reshape(-1)

        def moved(param: Param, weight: Any) -> np.ndarray:
            axes = list(param.dims)
            return wide(weight).take(heads, axes.index("heads")) if "heads" in axes else weight

        declared = self.attention.read_params(self.examples.shape[1])
        return map_params(moved, declared, {name: read[name] for name in declared})


class ConvertedLayer(NamedTuple):
    """The new attention of a layer, with its weights.

    write: None in a layer that reads the entries of another
    reads: distance to that layer, negative; None for its own entries
    """

    attention: AnyAttention
    read: dict[str, Any]
    write: dict[str, Any] | None
    reads: int | None = None


@dataclass(frozen=True)
class Conversion:
    """Base class of conversions. The first field is the number after the colon of `--to`, the
    others are its options in parentheses."""

    @property
    def uses_examples(self) -> bool:
        """Whether the weights depend on examples."""
        return True

    def misfits(self, attention: Grouped) -> Iterator[Misfit]:
        """Yield each property that prevents the conversion of a layer: a field of its attention,
        its value, and what would be possible."""
        yield from ()

    def excess(self, attention: Grouped) -> Iterator[tuple[str, str]]:
        """Yield each field of this conversion that is too large for a layer, and what would be
        possible."""
        yield from ()

    def check(self, layers: Sequence[ResolvedLayer]) -> None:
        """Raise BadInput for layers that can't be converted, with what is possible."""
        for layer in layers:
            assert isinstance(layer.attention, Grouped)
            for where, given, allowed in self.misfits(layer.attention):
                raise BadInput(f"layer {layer.index}: attention.{where}", given, allowed)
            for name, allowed in self.excess(layer.attention):
                raise BadInput(f"--to: {name}", getattr(self, name), allowed)

    def converted(self, source: Sequence[SourceLayer]) -> list[ConvertedLayer]:
        """Convert all layers."""
        return [self.converted_layer(each) for each in source]

    def converted_layer(self, source: SourceLayer) -> ConvertedLayer:
        """Convert one layer that writes its own entries."""
        raise NotImplementedError


def alike(one: SourceLayer, other: SourceLayer) -> Float[np.ndarray, "kv_heads kv_heads"]:
    """Return the similarity of two layers' KV heads in keys and values, 0 to 2."""
    keys, values = ([each.of_examples(n) for each in (one, other)] for n in ("key", "value"))
    return np.array(
        [
            [
                cosine(one.pairs, key, another) + cosine(None, value, further)
                for another, further in zip(keys[1], values[1], strict=True)
            ]
            for key, value in zip(keys[0], values[0], strict=True)
        ]
    )


def plain_misfits(attention: Grouped, width: int | None = None) -> Iterator[Misfit]:
    """Yield each property by which keys and values are not linear in the layer's input.

    width: of a query after the conversion; None if it stays
    """
    reason = "keys and values have to be linear in what a layer reads; fewer heads are possible: "
    if attention.norm:
        yield "norm", attention.norm, f"null: {reason}gqa or mqa"
    if attention.biases:
        yield "biases", list(attention.biases), f"none: {reason}gqa or mqa"
    position, heads = attention.position, attention.heads
    before = position.params(attention.head_dim, heads)
    if width is not None and position.params(width, heads) != before:
        yield "position", position.kind, "one without weights of the width of a head, such as rope"


def wide(array: Any) -> np.ndarray:
    """Convert an array to float64."""
    return np.asarray(array).astype(np.float64)
