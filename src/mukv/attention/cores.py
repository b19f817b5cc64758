"""softmax(query . key) value, in two forms that agree.

`plain` has all logits in view, as biases, policies and taps need. `fused` goes through the
queries in chunks and never holds a token x token tensor, forward or backward: each chunk meets
only the keys that causality and window leave to it, and recomputes its weights when gradients
are taken. A query that sees nothing yields zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mukv.attention.entries import Entries
from mukv.attention.mask import Mask
from mukv.core.tap import capturing, tap
from mukv.core.typing import Array, Bool, Float, Int

CHUNK = 256


@dataclass(frozen=True)
class Part:
    """Keys and values of one bag of entries, and who sees them."""

    key: Float[Array, "batch kv_heads key head_dim"]
    value: Float[Array, "batch kv_heads key width"]
    visible: Bool[Array, "batch #kv_heads query key"]


Logits = Float[Array, "batch kv_heads group query key"]


def plain(
    query: Float[Array, "batch kv_heads group query head_dim"],
    parts: Sequence[Part],
    scale: float,
    bias: Callable[[Logits], Logits] | None = None,
) -> Float[Array, "batch kv_heads group query width"]:
    """One softmax over all parts, which are never joined: a decode step reads a large body and a
    small tail without copying either."""
    query = query * jnp.asarray(scale, query.dtype)
    logits = jnp.concatenate(
        [
            jnp.einsum("bgrqd,bgkd->bgrqk", query, part.key, preferred_element_type=jnp.float32)
            for part in parts
        ],
        axis=-1,
    )
    logits = tap("logits", logits if bias is None else bias(logits))
    visible = jnp.concatenate([part.visible for part in parts], axis=-1)[:, :, None]
    # Division by the sum waits until the values are added up: the smaller of the two tensors.
    masked = jnp.where(visible, logits, -jnp.inf)
    top = jax.lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True))
    weights = jnp.exp(masked - jnp.where(jnp.isfinite(top), top, 0.0))
    total = jnp.sum(weights, axis=-1, keepdims=True)
    total = jnp.where(total > 0, total, 1.0)
    if capturing():
        tap("weights", weights / total)
    out, start = None, 0
    for part in parts:
        stop = start + part.key.shape[2]
        share = jnp.einsum(
            "bgrqk,bgkd->bgrqd",
            jax.lax.slice_in_dim(weights, start, stop, axis=4).astype(part.value.dtype),
            part.value,
            preferred_element_type=jnp.float32,
        )
        out, start = share if out is None else out + share, stop
    assert out is not None
    return (out / total).astype(query.dtype)


def fused(
    query: Float[Array, "batch kv_heads group query head_dim"],
    entries: Entries,
    key: Float[Array, "batch kv_heads key head_dim"],
    value: Float[Array, "batch kv_heads key width"],
    position: Int[Array, "batch query"],
    mask: Mask,
    scale: float,
    chunk: int = CHUNK,
) -> Float[Array, "batch kv_heads group query width"]:
    """Aligned self-attention by chunks of queries; memory grows with chunk x token."""
    length = query.shape[3]

    @jax.checkpoint
    def attend(
        query: Array, key: Array, value: Array, visible: Array
    ) -> Float[Array, "batch kv_heads group query width"]:
        return plain(query, [Part(key, value, visible)], scale)

    outputs = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        first = 0 if mask.window is None else max(0, start - mask.window + 1)
        segment = None if mask.segment is None else mask.segment[:, start:stop]
        rows = Mask(segment=segment, window=mask.window)
        visible = rows.visible(position[:, start:stop], entries.slice(first, stop))
        outputs.append(
            attend(
                query[:, :, :, start:stop], key[:, :, first:stop], value[:, :, first:stop], visible
            )
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)
