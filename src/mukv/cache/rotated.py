"""Store entries in few bits after a rotation that spreads large channels over all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import jax.numpy as jnp
import numpy as np

from mukv.cache.quantised import between, channels_spread, packed, unpacked
from mukv.cache.store import Parts, SlotArray, Store
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Bool, Float, UInt8


@dataclass(frozen=True)
class Rotated(Store):
    """Rotate keys and values by a fixed orthogonal matrix, and store 4 or 3 bits per number
    (QuaRot, Ashkboos et al. 2024).

    The matrix is Hadamard's with random signs, or for widths that are no power of two a random one.
    The channels of a token are quantised between their minimum and maximum. A token is thus
    encoded by itself, so that a fold that drops other entries does not change it.

    bits: number of bits per number, 4 or 3
    group: channels of a token that share a minimum and a step; at most all
    seed: seed of the random signs, or of the random matrix
    """

    bits: Literal[4, 3] = 4
    group: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts(self, "group", most=1 << 16)
        if self.bits not in (4, 3):
            raise BadInput("bits", self.bits, "4 or 3")
        if not 0 <= self.seed < 1 << 31:
            raise BadInput("seed", self.seed, "from 0 to 2**31 - 1")

    def encode(
        self, key: bool, tensor: SlotArray, there: Bool[Array, "batch #heads slot"]
    ) -> Parts:
        turned = tensor.astype(jnp.float32) @ rotation(tensor.shape[-1], self.seed)
        number, factors = between(False, turned, there, 2**self.bits - 1, self.group)
        return {"number": (packed if self.bits == 4 else planes)(number), **factors}

    def decode(self, key: bool, parts: Parts, width: int) -> SlotArray:
        number = (unpacked if self.bits == 4 else joined)(parts["number"])[..., :width]
        step, low = (channels_spread(parts[part], width, self.group) for part in ("step", "low"))
        return (number.astype(jnp.float32) * step + low) @ rotation(width, self.seed).T


@lru_cache(maxsize=32)
def rotation(width: int, seed: int) -> Float[np.ndarray, "width width"]:
    """Return an orthogonal matrix, by which row vectors are multiplied from the right."""
    random = np.random.default_rng(seed)
    if width & (width - 1):
        found = np.linalg.qr(random.standard_normal((width, width)))[0]
    else:
        found = np.ones((1, 1))
        while len(found) < width:
            found = np.kron([[1, 1], [1, -1]], found)
        found = random.choice([-1.0, 1.0], width)[:, None] * found / width**0.5
    return found.astype(np.float32)


def planes(number: UInt8[Array, "batch heads slot width"]) -> UInt8[Array, "batch heads slot byte"]:
    """Pack 8 numbers of 3 bits into 3 bytes, one for each bit."""
    padded = jnp.pad(number, [(0, 0)] * 3 + [(0, -number.shape[-1] % 8)])
    eight = padded.reshape(*padded.shape[:3], -1, 1, 8)
    bits = (eight >> jnp.arange(3, dtype=jnp.uint8).reshape(1, 1, 1, 1, 3, 1)) & 1
    place = jnp.arange(8, dtype=jnp.uint8).reshape(1, 1, 1, 1, 1, 8)
    return jnp.sum(bits << place, axis=-1, dtype=jnp.uint8).reshape(*number.shape[:3], -1)


def joined(
    packed: UInt8[Array, "batch heads slot byte"],
) -> UInt8[Array, "batch heads slot width"]:
    """Return the numbers that `planes` packed, in order, and its padding."""
    three = packed.reshape(*packed.shape[:3], -1, 3, 1)
    bits = (three >> jnp.arange(8, dtype=jnp.uint8).reshape(1, 1, 1, 1, 1, 8)) & 1
    place = jnp.arange(3, dtype=jnp.uint8).reshape(1, 1, 1, 1, 3, 1)
    return jnp.sum(bits << place, axis=4, dtype=jnp.uint8).reshape(*packed.shape[:3], -1)
