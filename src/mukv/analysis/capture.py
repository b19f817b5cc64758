"""One streaming pass over a text: each batch is reduced where it is computed.

A reduction is given what each memory of the model saw (queries, keys, values and weights of all
layers that read it) inside the compiled forward pass, and returns sums; sums are added up over
batches, so that nothing grows with the number of samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mukv.attention import EntryStore
from mukv.core.compute import Compute, settled
from mukv.core.errors import BadInput
from mukv.core.tap import capture
from mukv.core.typing import Array, Float, Int
from mukv.model.decoder import Decoder
from mukv.model.plan import ResolvedLayer

BATCH_NUMBERS = 1 << 24
"""Attention weights of one layer that exist at once, whatever the number of samples."""


class CapturedRows(NamedTuple):
    """Tokens [batch token], their places in their documents, and which document it is (from 1)."""

    tokens: np.ndarray
    position: np.ndarray
    segment: np.ndarray


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Captured:
    """What was seen of one layer. query is scaled and key rotated, as they are multiplied."""

    query: Float[Array, "batch kv_heads group query width"]
    key: Float[Array, "batch kv_heads key width"]
    value: Float[Array, "batch kv_heads key value_dim"]
    weights: Float[Array, "batch kv_heads group query key"]
    position: Int[Array, "batch token"]
    segment: Int[Array, "batch token"]


Reduction = Callable[[ResolvedLayer, Captured], Any]
"""A pytree of sums for each layer."""


def batch_rows(model: Decoder, length: int) -> int:
    """Rows of `length` tokens that are looked at together."""
    heads = max(layer.attention.heads for layer in model.layers)
    return max(1, BATCH_NUMBERS // (heads * length * length))


def looked_at(
    model: Decoder, reduction: Reduction, compute: Compute
) -> Callable[[Any, CapturedRows], dict[int, Any]]:
    """The compiled pass over one batch: (weights, rows) -> sums by layer.

    Raises BadInput for layers whose queries read more than an entry per token.
    """
    for layer in model.layers:
        if list(layer.attention.bags.values()) != [EntryStore()]:
            allowed = "attention with one entry per token: what queries need is counted in tokens"
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
    """Sums by layer over all batches.

    weights: stacked and scaled. reduction: its sums are named. combine: for names that are not
    added up but, for instance, of which the least is kept.
    """
    look = looked_at(model, reduction, settled(compute, model.vocab_size))
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
