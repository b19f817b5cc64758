"""Bytes and operations of a model, computed from what it declares; nothing is allocated."""

from __future__ import annotations

import jax.numpy as jnp

from mukv.core.params import named
from mukv.model.decoder import Decoder
from mukv.model.plan import Resolved


def cached(model: Decoder, layer: Resolved) -> dict[str, tuple[int, int]]:
    """What a token leaves in this layer: heads and width of each tensor, from `write` itself."""
    if not layer.writes:
        return {}
    written = layer.attention.written(model.d_model, 1, 1, jnp.dtype("float32"))
    return {name: (leaf.shape[1], leaf.shape[3]) for name, leaf in written.items()}


def cache_bytes_per_token(model: Decoder, layer: Resolved, dtype: jnp.dtype) -> int:
    """Bytes that one more token costs in this layer."""
    return dtype.itemsize * sum(heads * width for heads, width in cached(model, layer).values())


def cache_bytes(model: Decoder, batch: int, length: int, tail: int, dtype: jnp.dtype) -> int:
    """Bytes of `empty_cache` with these sizes, without allocating it."""
    entries = sum(
        cache_bytes_per_token(model, layer, dtype) * (min(length, layer.window or length) + tail)
        for layer in model.writers
    )
    counters = 4 * batch + 4
    return batch * entries + counters


def flops_per_token(model: Decoder, length: int) -> int:
    """Floating-point operations of training per token at this sequence length: products
    only, backward counted twice the forward pass, attention as the mask leaves it."""
    products = sum(2 * param.size for param in named(model.params()).values() if param.fan_in)
    attention = sum(
        layer.attention.read_flops() * _mean_visible(length, layer.window) for layer in model.layers
    )
    return round(3 * (products + attention))


def _mean_visible(length: int, window: int | None) -> float:
    """Entries that a query sees on average, in a sequence of this length."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
