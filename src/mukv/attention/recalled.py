"""Keys and values as a core takes them: products with queries, mixtures by weights.

`Dense` has them in full, or keys in pieces whose products add up, so that pieces which lie apart
in the cache are never joined. All tensors are [batch heads key width], so that a core can cut
out a range of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mukv.core.linear import mixture, similarity
from mukv.core.typing import Array, Float
from mukv.position.base import Logits

Query = tuple[Float[Array, "batch kv_heads group query _"], ...]
"""A query in as many pieces as the keys have."""
Whole = Float[Array, "batch kv_heads key _"]


class Recalled:
    """The contract; a variant is a pytree of tensors with keys along axis 2."""

    def products(self, query: Query) -> Logits:
        """query . key, float32."""
        raise NotImplementedError

    def mixture(self, weights: Logits) -> Float[Array, "batch kv_heads group query width"]:
        """Sum of the values times their weights, float32."""
        raise NotImplementedError

    def dense(self, heads: int) -> tuple[Whole, Whole]:
        """Keys, their pieces joined, and values, of each of the KV heads that queries have."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Of a value."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dense(Recalled):
    """A piece of the key, or a value, with a single KV head is shared by all of them."""

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

    @property
    def width(self) -> int:
        return self.value.shape[-1]


def _product(query: Array, key: Array) -> Logits:
    batch, kv_heads, group, length, width = query.shape
    product = similarity(query.reshape(batch, key.shape[1], -1, width), key)
    return product.reshape(batch, kv_heads, group, length, -1)
