"""Capture the attention of each layer and reduce it to sums, batch by batch.

The reduction runs inside the compiled forward pass: it receives queries, keys, values and attention
weights of one layer and returns sums, which are added over batches. The arrays held therefore do
not grow with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mukv.attention import Attention, EntryStore
from mukv.core.compute import Compute, settled
from mukv.core.errors import BadInput
from mukv.core.tap import capture
from mukv.core.typing import Array, Float, Int
from mukv.model.decoder import Decoder
from mukv.model.plan import ResolvedLayer

BATCH_NUMBERS = 1 << 24
"""Maximum size of one layer's attention weights [batch head query key] in one batch."""


class CapturedRows(NamedTuple):
    """Rows of tokens, int32 [batch token].

    tokens: ids
    position: position of each token in its document, from 0
    segment: number of each token's document in the row, from 1; 0 is padding
    """

    tokens: np.ndarray
    position: np.ndarray
    segment: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Captured:
    """Arrays of one layer's attention in one batch, float32.

    query, key: scaled queries and keys, both rotated, whose dot product is the logit
    value: values
    weights: attention weights, after the softmax
    position, segment: as in CapturedRows
    """

    query: Float[Array, "batch kv_heads group query width"]
    key: Float[Array, "batch kv_heads key width"]
    value: Float[Array, "batch kv_heads key value_dim"]
    weights: Float[Array, "batch kv_heads group query key"]
    position: Int[Array, "batch token"]
    segment: Int[Array, "batch token"]


Reduction = Callable[[ResolvedLayer, Captured], Any]
"""A function of a layer and its captured arrays that returns a pytree of sums."""


def batch_rows(model: Decoder, length: int) -> int:
    """Return how many rows of `length` tokens form one batch."""
    attentions = (layer.attention for layer in model.layers)
    heads = max((each.heads for each in attentions if isinstance(each, Attention)), default=1)
    return max(1, BATCH_NUMBERS // (heads * length * length))


def looked_at(
    model: Decoder, reduction: Reduction, compute: Compute
) -> Callable[[Any, CapturedRows], dict[int, Any]]:
    """Return the compiled pass over one batch: (scaled weights, rows) -> sums by layer.

    Raises BadInput for a layer whose attention has other stores than one entry per token.
    """
    for layer in model.layers:
        if list(layer.attention.bags.values()) != [EntryStore()]:
            allowed = "attention that stores one entry per token: the measures count entries"
            raise BadInput("MODEL", f"{layer.attention.kind} in layer {layer.index}", allowed)

    @jax.jit
    def look(weights: Any, tokens: Array, position: Array, segment: Array) -> dict[int, Any]:
        with capture() as taps:
            model.hidden(weights, tokens, position, segment, compute)
        found: dict[int, Any] = {}
        for layer in model.layers:
            names = ("query", "key", "value", "weights")
            seen = {name: taps[f"layer{layer.index}.{name}"] for name in names}
            wide = {name: array.astype(jnp.float32) for name, array in seen.items()}
            found[layer.index] = reduction(
                layer, Captured(**wide, position=position, segment=segment)
            )
        return found

    return lambda weights, rows: look(weights, *map(jnp.asarray, rows))


def summed(
    model: Decoder,
    weights: Any,
    batches: Iterable[CapturedRows],
    reduction: Reduction,
    combine: Mapping[str, Callable[[Any, Any], Any]],
    compute: Compute | None = None,
) -> dict[int, dict[str, np.ndarray]]:
    """Reduce all batches; returns the results by layer and name, float64.

    weights: stacked and scaled
    reduction: function that returns a dict of arrays
    combine: function that combines the results of two batches, by name, such as np.minimum; results
        whose name is missing are added

    Raises BadInput as `looked_at` does.
    """
    look = looked_at(model, reduction, settled(compute))
    total: dict[int, dict[str, np.ndarray]] = {}
    for rows in batches:
        for index, sums in look(weights, rows).items():
            new = {name: np.asarray(value, np.float64) for name, value in sums.items()}
            old = total.get(index)
            total[index] = (
                new
                if old is None
                else {name: combine.get(name, np.add)(old[name], new[name]) for name in new}
            )
    return total
