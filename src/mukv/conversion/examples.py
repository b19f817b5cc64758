"""Compute the inputs of each layer's attention on a text: examples for a conversion."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.compute import Compute, settled
from mukv.core.tap import capture
from mukv.core.typing import Array, Float, Int
from mukv.model import Decoder


def examples_of(
    model: Decoder,
    weights: Any,
    tokens: Int[np.ndarray, "row token"],
    position: Int[np.ndarray, "row token"] | None = None,
    segment: Int[np.ndarray, "row token"] | None = None,
    compute: Compute | None = None,
) -> list[Float[np.ndarray, "example embed"]]:
    """Compute the input of each layer's attention for each token, after the norm: float32.

    weights: scaled. position, segment: as in the forward pass; tokens of segment 0 are left out.
    """
    read = _reader(model, settled(compute))
    found: list[list[np.ndarray]] = []
    for number in range(len(tokens)):
        row = [
            None if array is None else array[number][None] for array in (tokens, position, segment)
        ]
        kept = slice(None) if segment is None else segment[number] > 0
        found.append([layer[kept] for layer in jax.device_get(read(weights, *row))])
    return [np.concatenate(layer) for layer in zip(*found, strict=True)]


@lru_cache(maxsize=4)
def _reader(model: Decoder, compute: Compute) -> Callable[..., list[Array]]:
    """Compile `examples_of` for one row."""

    @jax.jit
    def read(
        weights: Any, ids: Int[Array, "1 token"], *places: Int[Array, "1 token"] | None
    ) -> list[Array]:
        with capture() as taps:
            model.hidden(weights, ids, *places, compute=compute)
        streams = [taps["embedding"], *(taps[f"layer{i}.mlp"] for i in range(len(model.layers)))]
        parts = model.unstack(weights)["layers"]
        return [
            model.residual.enter(own, "attention", model.norm, stream)[0].astype(jnp.float32)
            for own, stream in zip(parts, streams, strict=False)
        ]

    return read


def windows(texts: Sequence[np.ndarray], length: int, tokens: int) -> Int[np.ndarray, "row token"]:
    """Cut windows of at most `length` token ids, spread evenly over texts: about `tokens` ids."""
    length = min(length, max(map(len, texts)))
    starts = [
        (number, start)
        for number, text in enumerate(texts)
        for start in range(0, len(text) - length + 1, length)
    ]
    count = min(max(tokens // length, 1), len(starts))
    chosen = np.unique(np.linspace(0, len(starts) - 1, count).astype(int))
    rows = [texts[starts[i][0]][starts[i][1] : starts[i][1] + length] for i in chosen]
    return np.stack(rows).astype(np.int32)
