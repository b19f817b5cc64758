"""Bytes and operations of a model, computed from what it declares; nothing is allocated."""

from __future__ import annotations

from functools import cache

import jax
import jax.numpy as jnp

from mukv.attention import AnyAttention
from mukv.cache import FULL, Policy
from mukv.core.params import named
from mukv.model.base import LanguageModel
from mukv.model.plan import ResolvedLayer
from mukv.model.stack import Stack


def cached(stack: Stack, layer: ResolvedLayer) -> dict[str, tuple[int, int]]:
    """What an entry is made of in this layer: heads and width of each tensor, from `write`."""
    return _entry(layer.attention, stack.d_model) if layer.writes else {}


@cache
def _entry(attention: AnyAttention, d_model: int) -> dict[str, tuple[int, int]]:
    written = attention.written(d_model, 1, 1, jnp.dtype("float32"))
    return {name: (leaf.shape[1], leaf.shape[3]) for name, leaf in written.items()}


def entry_bytes(stack: Stack, layer: ResolvedLayer, dtype: jnp.dtype) -> int:
    """Bytes of one entry in this layer."""
    return dtype.itemsize * sum(heads * width for heads, width in cached(stack, layer).values())


def cache_bytes(
    model: LanguageModel,
    batch: int,
    length: int,
    tail: int,
    dtype: jnp.dtype,
    policy: Policy = FULL,
) -> int:
    """Bytes of `empty_cache` with these sizes, without allocating it."""
    if not policy.everything:
        room = batch, length, tail
        return jax.eval_shape(lambda: model.empty_cache(*room, dtype, policy)).nbytes()
    total = batch * model.state_bytes(dtype)
    for memory in model.memories(length, tail):
        for layer in memory.stack.writers:
            kept = min(memory.length, layer.window or memory.length) + memory.tail
            total += batch * kept * entry_bytes(memory.stack, layer, dtype)
        total += 4 * (batch + (batch if memory.by_row else 1))
    return total


def flops_per_token(model: LanguageModel, length: int) -> int:
    """Floating-point operations of training per token at this sequence length: products
    only, backward counted twice the forward pass, attention as the mask leaves it, of experts those
    that a token goes through."""
    products = sum(
        2 * param.size * param.active / model.every(name.split(".")[0])
        for name, param in named(model.params()).items()
        if param.fan_in
    )
    attention = sum(
        layer.attention.read_flops()
        * _mean_visible(max(length // stack.every, 1), layer.window)
        / (stack.asked or stack.every)
        for stack in model.stacks
        for layer in stack.layers
    )
    return round(3 * (products + attention))


def _mean_visible(length: int, window: int | None) -> float:
    """Entries that a query sees on average, in a sequence of this length."""
    window = min(window or length, length)
    return (window * (window + 1) / 2 + (length - window) * window) / length
