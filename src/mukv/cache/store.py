"""Encodings of entries. The default stores them unchanged.

A stored tensor is a dict of arrays, all [batch heads row width], with one row per slot, one row per
`multiple` slots for numbers that a run of slots shares, such as a quantisation step, or one row for
numbers that all slots share, such as the channels that are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.attention import Queries
from mukv.attention.stored import StoredRows
from mukv.core.typing import Array, Bool, Float, Int

SlotArray = Float[Array, "batch heads slot width"]
Parts = dict[str, Array]
Stored = dict[str, Parts]


@dataclass(frozen=True)
class Store:
    """Base class of encodings."""

    has_budget: ClassVar[bool] = False
    blockwise: ClassVar[bool] = True
    """Whether decoding makes a copy; a body is then decoded block by block when it is read."""
    in_kernels: ClassVar[bool] = False
    """Whether `decode_block` is implemented."""
    needs_queries: ClassVar[bool] = False
    """Whether `fitted` uses queries. Each KV head must then store a key of its own."""

    @property
    def multiple(self) -> int:
        """Number of slots that share a row."""
        return 1

    def fitted(
        self,
        key: bool,
        tensor: SlotArray,
        there: Bool[Array, "batch #heads slot"],
        queries: Queries | None,
        added: Int[Array, " batch"],
    ) -> Parts:
        """Return the arrays [batch heads 1 width] that all slots of a tensor share. They are made
        when the first entries of a row are written and never change; `decode` gets them as well.

        key, tensor, there: as in `encode`
        queries: of the new tokens, rotated and not scaled; None if they are not known
        added: number of new tokens of each row
        """
        return {}

    def reduced(
        self, key: bool, tensor: SlotArray, fitted: Parts
    ) -> Float[Array, "batch heads slot kept"]:
        """Return what `encode` gets of a tensor, with the arrays of `fitted`."""
        return tensor

    def encode(
        self, key: bool, tensor: SlotArray, there: Bool[Array, "batch #heads slot"]
    ) -> Parts:
        """Encode a tensor.

        key: whether the tensor is in `keys` of its attention variant
        there: which slots are in use
        """
        raise NotImplementedError

    def decode(self, key: bool, parts: Parts, width: int) -> SlotArray:
        """Decode a tensor to float32 or its original dtype; empty slots have arbitrary finite
        numbers.
        """
        raise NotImplementedError

    def decode_block(self, key: bool, rows: StoredRows, slots: int) -> Float[Array, "slot width"]:
        """Decode some slots of one head in a kernel, by operations that Triton compiles.

        rows: the rows of the stored arrays that belong to these slots
        slots: their number
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Exact(Store):
    """Store entries unchanged."""

    blockwise: ClassVar[bool] = False
    in_kernels: ClassVar[bool] = True

    def encode(
        self, key: bool, tensor: SlotArray, there: Bool[Array, "batch #heads slot"]
    ) -> Parts:
        return {"exact": tensor}

    def decode(self, key: bool, parts: Parts, width: int) -> SlotArray:
        return parts["exact"]

    def decode_block(self, key: bool, rows: StoredRows, slots: int) -> Float[Array, "slot width"]:
        return rows["exact"]


def rows(parts: Parts, slots: int, start: Int[Array, ""] | int, size: int) -> Parts:
    """Slice the stored arrays to slots `start` to `start + size`, both multiples of `multiple`; a
    single row is that of all slots."""

    def cut(array: Array) -> Array:
        if array.shape[2] == 1:
            return array
        per = slots // array.shape[2]
        return jax.lax.dynamic_slice_in_dim(array, start // per, size // per, axis=2)

    return {name: cut(array) for name, array in parts.items()}


def runs(parts: Parts, slots: int, index: Int[Array, "batch stores run"], length: int) -> Parts:
    """Gather runs of `length` slots, each from slot index * length; the result has one row per
    slot, or the single row of all slots."""

    def pick(array: Array) -> Array:
        if array.shape[2] == 1:
            return array
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
