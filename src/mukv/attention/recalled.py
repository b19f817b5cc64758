"""Keys and values in the form that attention cores use.

A core needs two operations: products of queries with keys, and mixtures of values. `Dense` stores
keys and values in full. Its keys may consist of pieces whose products are summed, so that pieces
that are separate tensors in the cache are not copied into one. All tensors are [batch heads key
width], so that a core can slice a range of keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.attention.stored import StoredForm, exact
from mukv.core.linear import mixture, similarity
from mukv.core.typing import Array, Float, Int
from mukv.position.base import Logits

Query = tuple[Float[Array, "batch kv_heads group query _"], ...]
"""Queries, in as many pieces as the keys have."""
Whole = Float[Array, "batch kv_heads key _"]
"""Keys or values of all KV heads in full."""


class Recalled:
    """Base class; a subclass is a pytree of tensors whose axis 2 is the axis of keys."""

    fades: ClassVar[bool] = False
    """Whether `faded` changes logits."""

    def products(self, query: Query) -> Logits:
        """Return the dot products of queries and keys; float32."""
        raise NotImplementedError

    def mixture(self, weights: Logits) -> Float[Array, "batch kv_heads group query width"]:
        """Return the sum of the values, weighted by `weights`; float32."""
        raise NotImplementedError

    def dense(self, heads: int) -> tuple[Whole, Whole]:
        """Return keys, with their pieces joined, and values for each of `heads` KV heads."""
        raise NotImplementedError

    def stored(self) -> StoredForm | str:
        """Return keys and values as they are stored, for kernels that decode them; or the reason
        why they are not read in this form."""
        return "keys and values are computed when they are read"

    @property
    def width(self) -> int:
        """Width of a value."""
        raise NotImplementedError

    def faded(
        self,
        logits: Logits,
        query: Int[Array, "batch query"],
        key: Int[Array, "batch #kv_heads key"],
    ) -> Logits:
        """Return the logits of pairs with what is added to them at last; float32. query, key:
        positions"""
        return logits


@dataclass(frozen=True)
class Forwarding(Recalled):
    """Base class of keys and values that are those of `recalled`, with something changed."""

    recalled: Recalled

    def products(self, query: Query) -> Logits:
        return self.recalled.products(query)

    def mixture(self, weights: Logits) -> Float[Array, "batch kv_heads group query width"]:
        return self.recalled.mixture(weights)

    def dense(self, heads: int) -> tuple[Whole, Whole]:
        return self.recalled.dense(heads)

    @property
    def width(self) -> int:
        return self.recalled.width


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(Recalled):
    """Keys, in one or more pieces, and values in full.

    A piece of the keys, or the values, may have a single KV head, which all KV heads then share.
    """

    keys: tuple[Float[Array, "batch _ key _"], ...]
    value: Float[Array, "batch #kv_heads key width"]

    def products(self, query: Query) -> Logits:
        pairs = zip(query, self.keys, strict=True)
        return sum((_product(*pair) for pair in pairs), start=jnp.zeros((), jnp.float32))

    def mixture(self, weights: Logits) -> Float[Array, "batch kv_heads group query width"]:
        batch, kv_heads, group, length, keys = weights.shape
        shared = weights.reshape(batch, self.value.shape[1], -1, keys)
        mixed = mixture(shared, self.value)
        return mixed.reshape(batch, kv_heads, group, length, -1)

    def dense(self, heads: int) -> tuple[Whole, Whole]:
        def each(piece: Array) -> Array:
            return jnp.broadcast_to(piece, (len(piece), heads, *piece.shape[2:]))

        return jnp.concatenate([each(key) for key in self.keys], axis=-1), each(self.value)

    def stored(self) -> StoredForm | str:
        known = {id(tensor): exact(tensor) for tensor in (*self.keys, self.value)}
        return StoredForm(tuple(known[id(key)] for key in self.keys), known[id(self.value)])

    @property
    def width(self) -> int:
        return self.value.shape[-1]


def _product(query: Array, key: Array) -> Logits:
    batch, kv_heads, group, length, width = query.shape
    product = similarity(query.reshape(batch, key.shape[1], -1, width), key)
    return product.reshape(batch, kv_heads, group, length, -1)
