"""Entries in 8 or 4 bits a number. What the newest tokens left is exact: it is in the tail.

Factors are float16. int8: symmetric, one factor for each token and head. int4: two to a byte,
between the least and the largest of a group, as in KIVI (Liu et al. 2024): keys by channel over
runs of tokens, because some channels are large throughout; anything else by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.cache.store import Parts, Store, Tensor
from mukv.core.typing import Array, Bool, Float, UInt4, UInt8

GROUP = 32


@dataclass(frozen=True)
class Int8(Store):
    def encode(self, name: str, tensor: Tensor, there: Bool[Array, "batch #heads slot"]) -> Parts:
        largest = jnp.max(jnp.abs(tensor), axis=-1, keepdims=True)
        scale = (largest / 127).astype(jnp.float16)
        number = jnp.round(tensor / _divisor(scale))
        return {"number": jnp.clip(number, -127, 127).astype(jnp.int8), "scale": scale}

    def decode(self, name: str, parts: Parts, width: int) -> Tensor:
        return parts["number"].astype(jnp.float32) * parts["scale"].astype(jnp.float32)


@dataclass(frozen=True)
class Int4(Store):
    multiple: ClassVar[int] = GROUP

    def encode(self, name: str, tensor: Tensor, there: Bool[Array, "batch #heads slot"]) -> Parts:
        runs = _runs if _is_key(name) else _channels
        grouped = runs(tensor).astype(jnp.float32)
        counted = runs(jnp.broadcast_to(there[..., None], tensor.shape))
        axis = 3 if _is_key(name) else 4
        low = jnp.min(jnp.where(counted, grouped, jnp.inf), axis=axis, keepdims=True)
        high = jnp.max(jnp.where(counted, grouped, -jnp.inf), axis=axis, keepdims=True)
        low = jnp.where(jnp.isfinite(low), low, 0.0).astype(jnp.float16)
        step = jnp.where(jnp.isfinite(high), (high - low) / 15, 0.0).astype(jnp.float16)
        number = jnp.clip(jnp.round((grouped - low) / _divisor(step)), 0, 15).astype(jnp.uint8)
        flat = number.reshape(*tensor.shape[:3], -1)[..., : tensor.shape[-1]]
        factors = {"low": jnp.squeeze(low, axis), "step": jnp.squeeze(step, axis)}
        return {"number": _packed(flat), **factors}

    def decode(self, name: str, parts: Parts, width: int) -> Tensor:
        number = _unpacked(parts["number"])[..., :width].astype(jnp.float32)
        slots = number.shape[2]

        def spread(factor: Array) -> Array:
            factor = factor.astype(jnp.float32)
            if _is_key(name):
                return jnp.repeat(factor, slots // factor.shape[2], axis=2)
            return jnp.repeat(factor, _group(width), axis=3)[..., :width]

        return number * spread(parts["step"]) + spread(parts["low"])


def _is_key(name: str) -> bool:
    return name.startswith("key")


def _group(width: int) -> int:
    """Channels of a token that share a factor."""
    return min(GROUP, width)


def _runs(tensor: Array) -> Array:
    """[batch heads run slot width]"""
    batch, heads, _, width = tensor.shape
    return tensor.reshape(batch, heads, -1, GROUP, width)


def _channels(tensor: Array) -> Array:
    """[batch heads slot run channel], the last run filled up with the last channel."""
    batch, heads, slots, width = tensor.shape
    group = _group(width)
    padded = jnp.pad(tensor, [(0, 0)] * 3 + [(0, -width % group)], mode="edge")
    return padded.reshape(batch, heads, slots, -1, group)


def _packed(
    number: UInt8[Array, "batch heads slot width"],
) -> UInt8[Array, "batch heads slot half"]:
    padded = jnp.pad(number, [(0, 0)] * 3 + [(0, number.shape[-1] % 2)])
    pairs = padded.reshape(*padded.shape[:3], -1, 2).astype(jnp.uint4)
    return jax.lax.bitcast_convert_type(pairs, jnp.uint8)


def _unpacked(
    packed: UInt8[Array, "batch heads slot half"],
) -> UInt4[Array, "batch heads slot width"]:
    # XLA's own view of a byte as two numbers: shifts and a concatenation take 6 times as long.
    return jax.lax.bitcast_convert_type(packed, jnp.uint4).reshape(*packed.shape[:3], -1)


def _divisor(scale: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """float32, and 1 where everything is equal."""
    return jnp.where(scale > 0, scale, 1).astype(jnp.float32)
