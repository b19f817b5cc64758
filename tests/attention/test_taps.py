"""Taps capture the queries, keys and weights that the attention core uses."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from mukv.attention import Attention
from mukv.core.tap import capture
from tests.laws import matrix

NAMES = [
    name
    for name, attention in matrix.ATTENTIONS.items()
    if isinstance(attention, Attention) and attention.sinks is None
]


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_softmax_of_queries_and_keys(name):
    """The weights equal the causal softmax(query . key) if there are no biases, caps or sinks."""
    model = matrix.build(name, "rope", "plain")

    @jax.jit
    def look(weights, ids):
        with capture() as taps:
            model.hidden(weights, ids, compute=matrix.EXACT)
        return dict(taps)

    taps = look(matrix.weights(model), matrix.tokens(2))
    for layer in range(2):
        seen = {key: taps[f"layer{layer}.{key}"] for key in ("query", "key", "value", "weights")}
        logits = np.einsum("bhgqd,bhkd->bhgqk", seen["query"], seen["key"])
        np.testing.assert_allclose(logits, taps[f"layer{layer}.logits"], atol=1e-5)
        np.testing.assert_allclose(seen["weights"].sum(-1), 1, atol=1e-5)
        assert seen["value"].shape[:3] == seen["key"].shape[:3]
