"""Compute the attention weights of a decoder on one text."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.attention import Attention
from mukv.core.compute import Compute, settled
from mukv.core.errors import BadInput
from mukv.core.tap import capture
from mukv.core.typing import Array, Int, Weights
from mukv.model import Decoder, LanguageModel
from mukv.model.plan import ResolvedLayer


def attention_weights(
    network: LanguageModel,
    weights: Weights,
    ids: Int[np.ndarray, "batch token"],
    compute: Compute | None = None,
) -> dict[int, np.ndarray]:
    """Compute the attention weights of every attention layer.

    weights: weights of the model, stacked and scaled
    ids: one row of token ids

    Returns float32 arrays [head query key] by number of the layer. Raises BadInput for a model that
    is not a decoder (the keys of a concept model are not tokens), for a model without attention,
    and for several rows.
    """
    if not isinstance(network, Decoder):
        raise BadInput("MODEL", network.kind, "a model of kind decoder")
    if not any(_attends(layer) for layer in network.layers):
        kinds = ", ".join(dict.fromkeys(layer.attention.kind for layer in network.layers))
        raise BadInput("MODEL", kinds, "a model with attention: a state has no weights to show")
    if len(ids) != 1:
        raise BadInput("text", f"{len(ids)} rows", "one text, or its token ids: [token]")
    found = _captured(network, settled(compute))(weights, ids)
    return {layer: np.asarray(each) for layer, each in found.items()}


def _attends(layer: ResolvedLayer) -> bool:
    """Whether a layer has attention weights."""
    return isinstance(layer.attention, Attention)


@lru_cache(maxsize=8)
def _captured(network: Decoder, compute: Compute) -> Any:
    """Compile the pass that returns the weights; one program per length."""

    def look(weights: Any, ids: Array) -> dict[int, Array]:
        with capture() as taps:
            network.hidden(weights, ids, compute=compute)
        found = {}
        for layer in filter(_attends, network.layers):
            seen = taps[f"layer{layer.index}.weights"][0].astype(jnp.float32)
            found[layer.index] = seen.reshape(-1, *seen.shape[-2:])
        return found

    return jax.jit(look)
