"""How an entry is stored: the contract, and the answer "as it is".

What is stored is a dict of arrays for each tensor of an entry, all [batch heads row width]: a row
per slot, or one per `multiple` slots for what a run of them has in common.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.core.typing import Array, Bool, Float, Int

Tensor = Float[Array, "batch heads slot width"]
Parts = dict[str, Array]
Stored = dict[str, Parts]


@dataclass(frozen=True)
class Store:
    multiple: ClassVar[int] = 1
    """Slots that have something in common."""
    blockwise: ClassVar[bool] = True
    """Whether reading makes a copy, which must never be one of everything."""

    def encode(self, key: bool, tensor: Tensor, there: Bool[Array, "batch #heads slot"]) -> Parts:
        """key: whether it is one of the variant's `keys`. there: which slots are in use."""
        raise NotImplementedError

    def decode(self, key: bool, parts: Parts, width: int) -> Tensor:
        """float32, or as it was given; slots that are not in use hold anything finite."""
        raise NotImplementedError


@dataclass(frozen=True)
class Exact(Store):
    """As it is."""

    blockwise: ClassVar[bool] = False

    def encode(self, key: bool, tensor: Tensor, there: Bool[Array, "batch #heads slot"]) -> Parts:
        return {"exact": tensor}

    def decode(self, key: bool, parts: Parts, width: int) -> Tensor:
        return parts["exact"]


def rows(parts: Parts, slots: int, start: Int[Array, ""] | int, size: int) -> Parts:
    """What is stored of slots `start` up to `start + size`, whole multiples."""

    def cut(array: Array) -> Array:
        per = slots // array.shape[2]
        return jax.lax.dynamic_slice_in_dim(array, start // per, size // per, axis=2)

    return {name: cut(array) for name, array in parts.items()}


def runs(parts: Parts, slots: int, index: Int[Array, "batch stores run"], length: int) -> Parts:
    """What is stored of slots number index * length and the `length` - 1 after each: gathered, a
    row for each slot."""

    def pick(array: Array) -> Array:
        per = slots // array.shape[2]
        batch, heads, _, width = array.shape
        together = length // per
        if together:
            joined = array.reshape(batch, heads, -1, together * width)
            taken = jnp.take_along_axis(joined, index[..., None], axis=2)
            taken = taken.reshape(batch, heads, -1, width)
        else:
            taken = jnp.take_along_axis(array, (index * length // per)[..., None], axis=2)
        return jnp.repeat(taken, length * index.shape[2] // taken.shape[2], axis=2)

    return {name: pick(array) for name, array in parts.items()}
