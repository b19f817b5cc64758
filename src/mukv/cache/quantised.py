"""Store entries in 8 or 4 bits per number. The newest entries, in the tail, are exact.

Keys are quantised between the minimum and the maximum of each channel over a run of 32 tokens, as
in KIVI (Liu et al. 2024), because some channels are large in all tokens (those with Qwen 2's
biases) and must not set the step of others. Other tensors are grouped per token, over 32 channels:
4 bits between minimum and maximum, 8 bits symmetric. Minima are float32, so that channels far from
zero keep their differences. Steps are bfloat16, which has float32's range, and are rounded up, so
that the largest level covers the maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.attention.stored import StoredRows
from mukv.cache.store import Parts, SlotArray, Store
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Bool, Float, UInt4, UInt8

GROUP, LARGEST = 32, 512
"""Default and upper bound of `group`. Bodies are decoded in blocks of 512 slots."""
ROUNDING = 2.0**-18
"""Relative error of a step that is computed from decoded numbers."""
ROUNDED_UP = 1 + 2**-7
"""Factor by which a step is multiplied, so that its bfloat16 value is not below the exact step."""


@dataclass(frozen=True)
class Quantised(Store):
    """Base class of encodings with one step for each group of numbers.

    group: tokens of a key's channel, or channels of a token, that share a step
    """

    group: int = GROUP

    in_kernels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.group < 2 or LARGEST % self.group:
            raise BadInput("group", self.group, f"a power of 2 from 2 to {LARGEST}")

    @property
    def multiple(self) -> int:
        return self.group


@dataclass(frozen=True)
class Int8(Quantised):
    """Store 8 bits per number (KIVI, Liu et al. 2024)."""

    def encode(
        self, key: bool, tensor: SlotArray, there: Bool[Array, "batch #heads slot"]
    ) -> Parts:
        if key:
            number, factors = between(key, tensor, there, 255, self.group)
            return {"number": number, **factors}
        grouped = _channels(tensor.astype(jnp.float32), self.group)
        exact = jnp.max(jnp.abs(grouped), axis=4, keepdims=True) / 127
        step = _step(exact, jnp.zeros_like(exact))
        number = jnp.clip(jnp.round(grouped / _divisor(step)), -127, 127).astype(jnp.int8)
        return {"number": _flat(number, tensor.shape), "step": jnp.squeeze(step, 4)}

    def decode(self, key: bool, parts: Parts, width: int) -> SlotArray:
        number = parts["number"].astype(jnp.float32)
        found = number * _spread(key, parts["step"], number.shape[2], width, self.group)
        if key:
            found += _spread(key, parts["low"], number.shape[2], width, self.group)
        return found

    def decode_block(self, key: bool, rows: StoredRows, slots: int) -> Float[Array, "slot width"]:
        number = rows["number"].astype(jnp.float32)
        found = number * _block_spread(rows["step"], number.shape)
        return found + _block_spread(rows["low"], number.shape) if key else found


@dataclass(frozen=True)
class Int4(Quantised):
    """Store 4 bits per number (KIVI, Liu et al. 2024)."""

    def encode(
        self, key: bool, tensor: SlotArray, there: Bool[Array, "batch #heads slot"]
    ) -> Parts:
        number, factors = between(key, tensor, there, 15, self.group)
        return {"number": packed(number), **factors}

    def decode(self, key: bool, parts: Parts, width: int) -> SlotArray:
        number = unpacked(parts["number"])[..., :width].astype(jnp.float32)
        step, low = (
            _spread(key, parts[part], number.shape[2], width, self.group)
            for part in ("step", "low")
        )
        return number * step + low

    def decode_block(self, key: bool, rows: StoredRows, slots: int) -> Float[Array, "slot width"]:
        byte = rows["number"]
        pairs = jnp.stack([byte & 15, byte >> 4], axis=-1)
        number = pairs.reshape(slots, -1).astype(jnp.float32)
        step, low = (_block_spread(rows[part], number.shape) for part in ("step", "low"))
        return number * step + low


def between(
    key: bool, tensor: SlotArray, there: Bool[Array, "batch #heads slot"], levels: int, group: int
) -> tuple[UInt8[Array, "batch heads slot width"], Parts]:
    """Quantise each group to integers 0 to `levels` between its minimum and maximum.

    Returns the integers and the group's `low` and `step`. Empty slots are ignored.
    """
    runs, axis = (_runs, 3) if key else (_channels, 4)
    grouped = runs(tensor.astype(jnp.float32), group)
    counted = runs(jnp.broadcast_to(there[..., None], tensor.shape), group)
    low = jnp.min(jnp.where(counted, grouped, jnp.inf), axis=axis, keepdims=True)
    high = jnp.max(jnp.where(counted, grouped, -jnp.inf), axis=axis, keepdims=True)
    low, high = (jnp.where(jnp.isfinite(end), end, 0.0) for end in (low, high))
    # Divide first, because the difference of two float32 numbers may be infinite.
    error = ROUNDING * jnp.maximum(jnp.abs(low), jnp.abs(high)) / levels / 8
    step = _step(high / levels - low / levels, error)
    parts = grouped / _divisor(step) - low / _divisor(step)
    number = jnp.clip(jnp.round(parts), 0, levels).astype(jnp.uint8)
    factors = {"low": jnp.squeeze(low, axis), "step": jnp.squeeze(step, axis)}
    return _flat(number, tensor.shape), factors


def _step(exact: Float[Array, "*shape"], error: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Round up to bfloat16, unless it is one up to float32's rounding.

    A step is therefore found again from numbers that were decoded with it, and entries don't change
    when they are encoded again at every fold. error: of `exact`.
    """
    near = exact.astype(jnp.bfloat16)
    covers = near.astype(jnp.float32) >= exact * (1 - ROUNDING) - error
    return jnp.where(covers, near, (exact * ROUNDED_UP).astype(jnp.bfloat16))


def _flat(number: Array, shape: tuple[int, ...]) -> Array:
    """Reshape groups to slots and channels, without the padding of the last group."""
    return number.reshape(*shape[:3], -1)[..., : shape[-1]]


def _spread(
    key: bool, factor: Float[Array, "batch heads row some"], slots: int, width: int, group: int
) -> Float[Array, "batch heads slot #width"]:
    """Broadcast a group's factor to its numbers, float32."""
    if key:
        return jnp.repeat(factor.astype(jnp.float32), slots // factor.shape[2], axis=2)
    return channels_spread(factor, width, group)


def channels_spread(
    factor: Float[Array, "batch heads slot some"], width: int, group: int
) -> Float[Array, "batch heads slot width"]:
    """Broadcast the factor of each group of a token's channels to these, float32."""
    return jnp.repeat(factor.astype(jnp.float32), min(group, width), axis=3)[..., :width]


def _block_spread(
    factor: Float[Array, "row some"], shape: tuple[int, ...]
) -> Float[Array, "slot width"]:
    """Broadcast the factors of groups of slots, or of groups of channels, to a block, float32."""
    (rows, some), (slots, width) = factor.shape, shape
    axis, each = (1, slots // rows) if rows < slots else (2, width // some)
    wide = jnp.expand_dims(factor.astype(jnp.float32), axis)
    sizes = [rows, some]
    sizes.insert(axis, each)
    return jnp.broadcast_to(wide, sizes).reshape(shape)


def _runs(tensor: Array, group: int) -> Array:
    """Group by runs of slots: [batch heads run slot width]."""
    batch, heads, _, width = tensor.shape
    return tensor.reshape(batch, heads, -1, group, width)


def _channels(tensor: Array, group: int) -> Array:
    """Group by runs of channels: [batch heads slot run channel]; the last run is padded with its
    last channel.
    """
    batch, heads, slots, width = tensor.shape
    group = min(group, width)
    padded = jnp.pad(tensor, [(0, 0)] * 3 + [(0, -width % group)], mode="edge")
    return padded.reshape(batch, heads, slots, -1, group)


def packed(
    number: UInt8[Array, "batch heads slot width"],
) -> UInt8[Array, "batch heads slot half"]:
    padded = jnp.pad(number, [(0, 0)] * 3 + [(0, number.shape[-1] % 2)])
    pairs = padded.reshape(*padded.shape[:3], -1, 2).astype(jnp.uint4)
    return jax.lax.bitcast_convert_type(pairs, jnp.uint8)


def unpacked(
    packed: UInt8[Array, "batch heads slot half"],
) -> UInt4[Array, "batch heads slot width"]:
    # XLA's bitcast of a byte to two numbers; shifts and a concatenation take 6 times as long.
    return jax.lax.bitcast_convert_type(packed, jnp.uint4).reshape(*packed.shape[:3], -1)


def _divisor(scale: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the step as float32, with 1 for groups of equal numbers."""
    return jnp.where(scale > 0, scale, 1).astype(jnp.float32)
