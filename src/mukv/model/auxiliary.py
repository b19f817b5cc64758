"""What a layer reports besides its output: a penalty for training, and numbers to watch.

A feed-forward part or an attention returns a dict of float32 numbers, one for each row of the
batch, or None for nothing. "penalty" is what training minimises besides the cross-entropy, in nats
per token; every other name is only reported.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp

from mukv.core.typing import Array, Float

Auxiliary = dict[str, Float[Array, "... batch"]]
"""[batch], or [repeats batch] of layers that were scanned."""
PENALTY = "penalty"


def together(*parts: Auxiliary | None) -> Auxiliary:
    """What the parts of one layer report. Only penalties may have the same name: they add up."""
    joined: Auxiliary = {}
    for part in parts:
        for name, value in (part or {}).items():
            assert name == PENALTY or name not in joined, f"two parts of a layer report {name}"
            joined[name] = joined[name] + value if name in joined else value
    return joined


def over_layers(layers: Sequence[Auxiliary]) -> Auxiliary:
    """Penalties summed over layers, other numbers averaged over the layers that report them.

    layers: [batch] for a layer, [repeats batch] for repeats that were scanned.
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
