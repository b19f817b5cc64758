"""Auxiliary numbers that a layer reports besides its output: a penalty, and values to log.

A feed-forward part or an attention returns a dict of float32 numbers, one for each row of the
batch, or None for none. Training adds "penalty" to the cross-entropy, in nats per token; all other
names are only logged.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from mukv.core.typing import Array, Float

Auxiliary = dict[str, Float[Array, "... batch"]]
"""Numbers by name, [batch], or [repeats batch] for layers that were scanned."""
PENALTY = "penalty"


def together(*parts: Auxiliary | None) -> Auxiliary:
    """Merge the auxiliary numbers of the parts of one layer: penalties are added, other names must
    be distinct."""
    joined: Auxiliary = {}
    for part in parts:
        for name, value in (part or {}).items():
            assert name == PENALTY or name not in joined, f"two parts of a layer report {name}"
            joined[name] = joined[name] + value if name in joined else value
    return joined


def over_layers(layers: Sequence[Auxiliary]) -> Auxiliary:
    """Sum penalties over layers, and average other numbers over the layers that report them.

    layers: one dict of arrays [batch] per layer, or of [repeats batch] per scanned layer

    Returns arrays [batch].
    """
    found: dict[str, list[Array]] = {}
    for layer in layers:
        for name, value in layer.items():
            found.setdefault(name, []).append(value.reshape(-1, value.shape[-1]))
    by_name = {name: jnp.concatenate(values) for name, values in found.items()}
    return {
        name: jnp.sum(values, axis=0) if name == PENALTY else jnp.mean(values, axis=0)
        for name, values in by_name.items()
    }
