"""Entries in 8 or 4 bits a number. What the newest tokens left is exact: it is in the tail.

Keys lie between the least and the largest of a channel in a run of 32 tokens, as in KIVI (Liu et
al. 2024), since some channels are large throughout (the biases of Qwen 2 are) and must not set the
step of the others. Anything else is grouped by token, over 32 channels: in 4 bits between least and
largest, in 8 bits symmetric. Least values are float32, so that a channel far from zero keeps its
differences; steps are bfloat16, which has float32's range, rounded up, so that they reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.cache.store import Parts, Store, Tensor
from mukv.core.typing import Array, Bool, Float, UInt4, UInt8

GROUP = 32
ROUNDED_UP = 1 + 2**-7
"""Times a step: its bfloat16 is then at least the step."""


@dataclass(frozen=True)
class Int8(Store):
    multiple: ClassVar[int] = GROUP

    def encode(self, key: bool, tensor: Tensor, there: Bool[Array, "batch #heads slot"]) -> Parts:
        if key:
            number, factors = _between(key, tensor, there, 255)
            return {"number": number, **factors}
        grouped = _channels(tensor.astype(jnp.float32))
        step = _step(jnp.max(jnp.abs(grouped), axis=4, keepdims=True) / 127)
        number = jnp.clip(jnp.round(grouped / _divisor(step)), -127, 127).astype(jnp.int8)
        return {"number": _flat(number, tensor.shape), "step": jnp.squeeze(step, 4)}

    def decode(self, key: bool, parts: Parts, width: int) -> Tensor:
        number = parts["number"].astype(jnp.float32)
        found = number * _spread(key, parts["step"], number.shape[2], width)
        if key:
            found += _spread(key, parts["low"], number.shape[2], width)
        return found


@dataclass(frozen=True)
class Int4(Store):
    multiple: ClassVar[int] = GROUP

    def encode(self, key: bool, tensor: Tensor, there: Bool[Array, "batch #heads slot"]) -> Parts:
        number, factors = _between(key, tensor, there, 15)
        return {"number": _packed(number), **factors}

    def decode(self, key: bool, parts: Parts, width: int) -> Tensor:
        number = _unpacked(parts["number"])[..., :width].astype(jnp.float32)
        step, low = (_spread(key, parts[part], number.shape[2], width) for part in ("step", "low"))
        return number * step + low


def _between(
    key: bool, tensor: Tensor, there: Bool[Array, "batch #heads slot"], levels: int
) -> tuple[UInt8[Array, "batch heads slot width"], Parts]:
    """Numbers from 0 to `levels` between the least and the largest of each group, and the group's
    `low` and `step`; slots that are not there do not count."""
    runs, axis = (_runs, 3) if key else (_channels, 4)
    grouped = runs(tensor.astype(jnp.float32))
    counted = runs(jnp.broadcast_to(there[..., None], tensor.shape))
    low = jnp.min(jnp.where(counted, grouped, jnp.inf), axis=axis, keepdims=True)
    high = jnp.max(jnp.where(counted, grouped, -jnp.inf), axis=axis, keepdims=True)
    low, high = (jnp.where(jnp.isfinite(end), end, 0.0) for end in (low, high))
    # Divided first: the difference of two float32 may be infinite.
    step = _step(high / levels - low / levels)
    parts = grouped / _divisor(step) - low / _divisor(step)
    number = jnp.clip(jnp.round(parts), 0, levels).astype(jnp.uint8)
    factors = {"low": jnp.squeeze(low, axis), "step": jnp.squeeze(step, axis)}
    return _flat(number, tensor.shape), factors


def _step(exact: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """In bfloat16, and no smaller."""
    return (exact * ROUNDED_UP).astype(jnp.bfloat16)


def _flat(number: Array, shape: tuple[int, ...]) -> Array:
    """Groups as slots and channels again, without what filled up the last group."""
    return number.reshape(*shape[:3], -1)[..., : shape[-1]]


def _spread(
    key: bool, factor: Float[Array, "batch heads row some"], slots: int, width: int
) -> Float[Array, "batch heads slot #width"]:
    """A factor for each number, float32."""
    factor = factor.astype(jnp.float32)
    if key:
        return jnp.repeat(factor, slots // factor.shape[2], axis=2)
    return jnp.repeat(factor, _group(width), axis=3)[..., :width]


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
