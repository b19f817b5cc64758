"""What the attention of each layer reads on a text: examples for a conversion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.compute import Compute, settled
from mukv.core.errors import BadInput
from mukv.core.tap import capture
from mukv.core.typing import Array, Float, Int
from mukv.model import Decoder


def examples_of(
    model: Decoder,
    weights: Any,
    rows: Int[np.ndarray, "row token"],
    compute: Compute | None = None,
) -> list[Float[np.ndarray, "example embed"]]:
    """The normed residual stream that each layer's attention reads, float32, of all tokens.

    weights: scaled
    """
    compute = settled(compute, model.vocab_size)

    @jax.jit
    def read(weights: Any, ids: Int[Array, "1 token"]) -> list[Array]:
        with capture() as taps:
            model.hidden(weights, ids, compute=compute)
        streams = [taps["embedding"], *(taps[f"layer{i}.mlp"] for i in range(len(model.layers)))]
        parts = model.unstack(weights)["layers"]
        return [
            model.residual.enter(own, "attention", model.norm, stream)[0].astype(jnp.float32)
            for own, stream in zip(parts, streams, strict=False)
        ]

    found = [jax.device_get(read(weights, row[None])) for row in rows]
    return [np.concatenate(layer) for layer in zip(*found, strict=True)]


def windows(
    texts: Sequence[np.ndarray], length: int, tokens: int, where: str = "--text"
) -> Int[np.ndarray, "row token"]:
    """Windows of token ids, spread evenly over texts: at most `tokens` ids, at least one window.

    where: name of the texts in errors. Raises BadInput if no text is as long as a window.
    """
    starts = [
        (number, start)
        for number, text in enumerate(texts)
        for start in range(0, len(text) - length + 1, length)
    ]
    if not starts:
        longest = max(map(len, texts), default=0)
        raise BadInput(where, f"{longest} tokens", f"a text of at least {length} tokens")
    count = min(max(tokens // length, 1), len(starts))
    chosen = np.unique(np.linspace(0, len(starts) - 1, count).astype(int))
    rows = [texts[starts[i][0]][starts[i][1] : starts[i][1] + length] for i in chosen]
    return np.stack(rows).astype(np.int32)
