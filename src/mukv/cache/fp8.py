"""Store entries as 8-bit floats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.attention.stored import StoredRows
from mukv.cache.store import Parts, SlotArray, Store
from mukv.core.typing import Array, Bool, Float

LARGEST = 448.0
"""Largest finite number of e4m3fn, which has no infinity: larger ones must be clipped."""


@dataclass(frozen=True)
class FP8(Store):
    """Store floats of 8 bits, with 4 of exponent and 3 of mantissa (e4m3fn, Micikevicius et al.
    2022).

    The numbers of a token and head share a power of two, stored as an exponent of one byte, so that
    the largest is between 224 and 448. It costs no precision, and entries don't change when they
    are encoded again.
    """

    in_kernels: ClassVar[bool] = True

    def encode(
        self, key: bool, tensor: SlotArray, there: Bool[Array, "batch #heads slot"]
    ) -> Parts:
        wide = tensor.astype(jnp.float32)
        share, exponent = jnp.frexp(jnp.max(jnp.abs(wide), axis=-1, keepdims=True) / LARGEST)
        exponent = jnp.clip(jnp.where(share == 0.5, exponent - 1, exponent), -126, 127)
        small = jnp.clip(wide / _power(exponent), -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)
        number = jax.lax.bitcast_convert_type(small, jnp.uint8)
        return {"number": number, "exponent": exponent.astype(jnp.int8)}

    def decode(self, key: bool, parts: Parts, width: int) -> SlotArray:
        small = jax.lax.bitcast_convert_type(parts["number"], jnp.float8_e4m3fn)
        return small.astype(jnp.float32) * _power(parts["exponent"])

    def decode_block(self, key: bool, rows: StoredRows, slots: int) -> Float[Array, "slot width"]:
        small = jax.lax.bitcast_convert_type(rows["number"], jnp.float8_e4m3fn)
        # A power of two as the bits of its exponent, which Triton has no function for.
        bits = (rows["exponent"].astype(jnp.int32) + 127) << 23
        return small.astype(jnp.float32) * jax.lax.bitcast_convert_type(bits, jnp.float32)


def _power(exponent: Array) -> Array:
    return jnp.ldexp(jnp.ones((), jnp.float32), exponent.astype(jnp.int32))
