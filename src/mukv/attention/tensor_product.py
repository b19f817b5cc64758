"""Tensor-product attention (Zhang et al. 2025).

Queries, keys and values of all heads are means of `rank` outer products of a vector over heads and
a vector over the head's dimensions. The cache holds these factors, those of keys rotated. Products
with queries and mixtures of values are computed from the factors, without keys and values in full.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.attention.base import Attention, Queries
from mukv.attention.entries import Entries
from mukv.attention.mixer import Carried
from mukv.attention.recalled import Query, Recalled, Whole
from mukv.core.linear import project
from mukv.core.params import Param, Tag
from mukv.core.typing import Array, Float, Int, Residual, Weights
from mukv.position.base import Logits


@dataclass(frozen=True)
class TensorProduct(Attention):
    """Tensor-product attention (Zhang et al. 2025): queries, keys, values are sums of outer
    products.

    head_dim: width of a head
    query_rank: number of outer products per query
    rank: number of outer products per key and per value
    """

    kind: Literal["tensor_product"] = "tensor_product"
    head_dim: int = 32
    query_rank: int = 6
    rank: int = 2

    also: ClassVar[tuple[str, ...]] = ("tpa",)
    sizes: ClassVar[tuple[str, ...]] = ("heads", "head_dim", "query_rank", "rank")
    values_apart: ClassVar[bool] = True
    keys: ClassVar[tuple[str, ...]] = ("key_heads", "key")

    @property
    def query_dim(self) -> int:
        return self.head_dim

    def _factors(self, d_model: int, name: Tag, rank: int) -> dict[str, Param]:
        """Declare the two factors of queries, keys or values: over heads, and over the head's
        dimensions.
        """

        def factor(axis: str, size: int, tag: Tag | None = None) -> Param:
            return Param({"embed": d_model, "rank": rank, axis: size}, fan_in=("embed",), tag=tag)

        return {
            f"{name}_heads": factor("heads", self.heads),
            name: factor("head_dim", self.head_dim, name),
        }

    def write_params(self, d_model: int) -> dict[str, Param]:
        key = self._factors(d_model, "key", self.rank)
        return key | self._factors(d_model, "value", self.rank)

    def read_params(self, d_model: int) -> dict[str, Any]:
        query = self._factors(d_model, "query", self.query_rank)
        return {**query, **super().read_params(d_model)}

    def write(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None = None,
    ) -> dict[str, Float[Array, "batch rank token _"]]:
        names = ("key_heads", "key", "value_heads", "value")
        factors = {name: project(x, weights[name]).swapaxes(1, 2) for name in names}
        return factors | {"key": self.position.rotate(factors["key"], position[:, None])}

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        """Compute queries in full and rotated; each head is a KV head of its own."""
        heads = project(x, weights["query_heads"]).swapaxes(1, 2)
        vectors = project(x, weights["query"]).swapaxes(1, 2)
        rotated = self.position.rotate(vectors, position[:, None])
        query = jnp.einsum("brqh,brqd->bhqd", heads, rotated, preferred_element_type=jnp.float32)
        return (query / self.query_rank).astype(x.dtype)[:, :, None]

    def recall(self, weights: Weights, entries: Entries) -> Factored:
        return Factored(**entries.tensors)

    def memory(self) -> Hashable:
        return self.kind, self.heads, self.head_dim, self.rank, self.position.rotation()


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factored(Recalled):
    """Keys and values as factors: key of head h = mean over ranks of key_heads[h] * key; values
    alike.
    """

    key_heads: Float[Array, "batch rank key heads"]
    key: Float[Array, "batch rank key head_dim"]
    value_heads: Float[Array, "batch rank key heads"]
    value: Float[Array, "batch rank key head_dim"]

    def products(self, query: Query) -> Logits:
        (whole,) = query
        by_rank = jnp.einsum(
            "bhgqd,bnkd->bhgqkn", whole, self.key, preferred_element_type=jnp.float32
        )
        heads = self.key_heads.astype(jnp.float32) / self.key.shape[1]
        return jnp.einsum("bhgqkn,bnkh->bhgqk", by_rank, heads)

    def mixture(self, weights: Logits) -> Float[Array, "batch kv_heads group query width"]:
        heads = self.value_heads.astype(jnp.float32) / self.value.shape[1]
        by_rank = jnp.einsum("bhgqk,bnkh->bnhgqk", weights, heads)
        return jnp.einsum(
            "bnhgqk,bnkd->bhgqd",
            by_rank.astype(self.value.dtype),
            self.value,
            preferred_element_type=jnp.float32,
        )

    def dense(self, heads: int) -> tuple[Whole, Whole]:
        return _expanded(self.key_heads, self.key), _expanded(self.value_heads, self.value)

    @property
    def width(self) -> int:
        return self.value.shape[-1]


def _expanded(
    heads: Float[Array, "batch rank key heads"], vectors: Float[Array, "batch rank key head_dim"]
) -> Whole:
    """Multiply the factors: mean over ranks of the outer products."""
    return jnp.einsum("bnkh,bnkd->bhkd", heads, vectors) / vectors.shape[1]
