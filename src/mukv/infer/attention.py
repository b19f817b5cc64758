"""The attention weights of a decoder on one text."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.tap import capture
from mukv.core.typing import Array, Int, Weights
from mukv.model import Decoder, LanguageModel


def attention_weights(
    network: LanguageModel,
    weights: Weights,
    ids: Int[np.ndarray, "batch token"],
    compute: Compute | None = None,
) -> dict[int, np.ndarray]:
    """Compute the weights of every layer: float32 [head query key] by number of the layer.

    weights: stacked and scaled. ids: one row. Raises BadInput for another model than a decoder (the
    keys of a concept model are no tokens) and for several rows.
    """
    if not isinstance(network, Decoder):
        raise BadInput("MODEL", network.kind, "a model of kind decoder")
    if len(ids) != 1:
        raise BadInput("text", f"{len(ids)} rows", "one text, or its token ids: [token]")
    found = _captured(network, (compute or Compute()).resolve(network.vocab_size))(weights, ids)
    return {layer: np.asarray(each) for layer, each in found.items()}


@lru_cache(maxsize=8)
def _captured(network: Decoder, compute: Compute) -> Any:
    """Compile the pass that returns the weights; one program per length."""

    def look(weights: Any, ids: Array) -> dict[int, Array]:
        with capture() as taps:
            network.hidden(weights, ids, compute=compute)
        found = {}
        for layer in network.layers:
            seen = taps[f"layer{layer.index}.weights"][0].astype(jnp.float32)
            found[layer.index] = seen.reshape(-1, *seen.shape[-2:])
        return found

    return jax.jit(look)
