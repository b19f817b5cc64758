"""Merge entries that are dropped into those that are kept. By default they are lost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.core.errors import BadInput
from mukv.core.typing import Array, Bool, Float, Int

CHUNK = 512
"""Number of dropped entries that are compared with all kept ones at once."""
LEAST = 1e-6
"""Number added to the sum of two norms, so that two values of zeros can be divided."""


@dataclass(frozen=True)
class Merge:
    """Base class of what becomes of the entries that are not kept."""

    has_budget: ClassVar[bool] = False
    changes: ClassVar[bool] = True
    """Whether kept entries change. Each entry must then be one key and one value."""

    def values(
        self,
        key: Float[Array, "batch stores key width"],
        value: Float[Array, "batch stores key value_width"],
        there: Bool[Array, "batch stores key"],
        owner: Int[Array, "batch stores key"] | None,
        index: Int[Array, "batch stores slot"],
        kept: Bool[Array, "batch stores slot"],
    ) -> Float[Array, "batch stores slot value_width"]:
        """Return the values of the kept entries.

        there: which entries are in use. owner: head of each, where heads share a store
        index: of the entries in each slot. kept: which slots are in use
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Drop(Merge):
    """Delete the entries that are not kept."""

    changes: ClassVar[bool] = False


@dataclass(frozen=True)
class Nearest(Merge):
    """Merge the value of each dropped entry into that of the kept entry with the most similar key
    (D2O, Wan et al. 2024).

    The weight of a dropped value v_i is cos(k_i, k_j) |v_i| / (|v_i| + |v_j|), that of the kept one
    v_j is 1; the result is their weighted mean. Keys do not change.

    similarity: least cosine between the two keys; entries with a smaller one are lost
    """

    similarity: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.similarity <= 1:
            raise BadInput("similarity", self.similarity, "a cosine from 0 to 1")

    def values(
        self,
        key: Float[Array, "batch stores key width"],
        value: Float[Array, "batch stores key value_width"],
        there: Bool[Array, "batch stores key"],
        owner: Int[Array, "batch stores key"] | None,
        index: Int[Array, "batch stores slot"],
        kept: Bool[Array, "batch stores slot"],
    ) -> Float[Array, "batch stores slot value_width"]:
        owner = jnp.zeros_like(there, jnp.int32) if owner is None else owner
        each = jax.vmap(jax.vmap(self._one_store))
        return each(key, value, there, owner, index, kept).astype(value.dtype)

    def _one_store(
        self,
        key: Float[Array, "key width"],
        value: Float[Array, "key value_width"],
        there: Bool[Array, " key"],
        owner: Int[Array, " key"],
        index: Int[Array, " slot"],
        kept: Bool[Array, " slot"],
    ) -> Float[Array, "slot value_width"]:
        value = value.astype(jnp.float32)
        keys, slots = len(key), len(index)
        unit, norm = _unit(key.astype(jnp.float32)), jnp.linalg.norm(value, axis=-1)
        stays = jnp.zeros(keys, bool).at[jnp.where(kept, index, keys)].set(True, mode="drop")
        lost = there & ~stays
        chunk = min(CHUNK, keys)
        padded = jnp.minimum(jnp.arange(-(-keys // chunk) * chunk), keys - 1)
        lost = jnp.pad(lost, (0, len(padded) - keys))

        def add(sums: tuple[Array, Array], start: Array) -> tuple[tuple[Array, Array], None]:
            own = jax.lax.dynamic_slice_in_dim(padded, start, chunk)
            goes = jax.lax.dynamic_slice_in_dim(lost, start, chunk)
            cosine = jnp.matmul(unit[own], unit[index].T, precision="highest")
            same = owner[own][:, None] == owner[index][None]
            cosine = jnp.where(kept[None] & same, cosine, -jnp.inf)
            nearest, most = jnp.argmax(cosine, axis=-1), jnp.max(cosine, axis=-1)
            share = norm[own] / (norm[own] + norm[index[nearest]] + LEAST)
            weight = jnp.where(goes & (most >= self.similarity), most * share, 0.0)
            total, weights = sums
            total = total.at[nearest].add(weight[:, None] * value[own])
            return (total, weights.at[nearest].add(weight)), None

        empty = jnp.zeros((slots, value.shape[-1])), jnp.zeros(slots)
        (total, weights), _ = jax.lax.scan(add, empty, jnp.arange(0, len(padded), chunk))
        return (value[index] + total) / (1 + weights)[:, None]


def _unit(x: Float[Array, "key width"]) -> Float[Array, "key width"]:
    return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
