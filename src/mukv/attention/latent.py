"""Multi-head latent attention (DeepSeek-V2, 2024, section 2.1; V3's inference code).

A token's entry is a normed latent, from which the keys and values of all heads are projected, and
one rotated key that all heads share. There are two forms of the same function: training and prefill
project the latent to keys and values (expanded); decoding moves these projections to the queries
and the output (absorbed), so that it reads the latent itself.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.attention.base import Queries
from mukv.attention.entries import Bag, Entries
from mukv.attention.indexed import INDEX, IndexedRead
from mukv.attention.indexed_attention import IndexedAttention
from mukv.attention.indexer import Indexer
from mukv.attention.mask import Mask
from mukv.attention.mixer import Carried, EntryStore
from mukv.attention.recalled import Dense, Query
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.norm import RMSNorm
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Residual, Weights

INDEX_NORM = RMSNorm(centred=True)
"""LayerNorm of the indexer's keys."""


@dataclass(frozen=True)
class Latent(IndexedAttention):
    """Multi-head latent attention (DeepSeek-V2, 2024, section 2.1).

    rank: width of the latent
    head_dim: width of the part of a key that is projected from the latent
    rope_dim: width of the rotated part of a key, which all heads share
    rope_parts: equal pieces of the rotated part, each of which is rotated as a head of its own
    head_value_dim: width of a value; head_dim if None
    query_rank: width of the normed latent from which queries are projected; None to project the
        residual stream itself
    norm: RMSNorm of the latents; None for none, as converted models have it
    indexer: what chooses the entries that a query reads (DSA, DeepSeek-V3.2, 2512.02556, section
        2.1); it makes its queries from the query latent, so that `query_rank` is needed. None to
        read all entries
    """

    kind: Literal["latent"] = "latent"
    rank: int = 64
    head_dim: int = 32
    rope_dim: int = 16
    rope_parts: int = 1
    head_value_dim: int | None = None
    query_rank: int | None = None
    norm: RMSNorm | None = field(default_factory=RMSNorm)
    indexer: Indexer | None = None

    also: ClassVar[tuple[str, ...]] = ("mla", "dsa")
    sizes: ClassVar[tuple[str, ...]] = ("heads", "rank", "head_dim", "rope_dim")
    grows: ClassVar[tuple[str, ...]] = ("heads", "rank", "query_rank")
    keys: ClassVar[tuple[str, ...]] = ("key",)

    def __post_init__(self) -> None:
        require_counts(self, "head_value_dim", "query_rank", "rope_parts", most=1 << 16)
        if self.rope_dim % self.rope_parts:
            allowed = f"must divide rope_dim ({self.rope_dim})"
            raise BadInput("rope_parts", self.rope_parts, allowed)
        super().__post_init__()
        if self.indexer is None:
            return
        if self.query_rank is None:
            allowed = "at least 1, since the indexer makes its queries from the query latent"
            raise BadInput("query_rank", None, allowed)
        if self.indexer.width < self.rope_dim:
            allowed = f"at least rope_dim ({self.rope_dim}), which is rotated"
            raise BadInput("indexer.width", self.indexer.width, allowed)
        if self.position.sequential:
            allowed = (
                "an encoding whose bias does not depend on the keys between query and key: an "
                "indexer leaves some of them out"
            )
            raise BadInput("position", self.position.kind, allowed)

    @property
    def query_dim(self) -> int:
        return self.head_dim + self.rope_dim

    @property
    def value_dim(self) -> int:
        return self.head_value_dim or self.head_dim

    @property
    def rotated_dim(self) -> int:
        return self.rope_dim

    @property
    def rotated_parts(self) -> int:
        return self.rope_parts

    def write_params(self, d_model: int) -> dict[str, Any]:
        declared: dict[str, Any] = {
            "latent": Param({"embed": d_model, "latent": self.rank}, fan_in=("embed",)),
            "key": Param(
                {"embed": d_model, "rope_dim": self.rope_dim}, fan_in=("embed",), tag="key"
            ),
        }
        if self.norm:
            declared["norm"] = self.norm.params(self.rank, "latent")
        if self.indexer:
            width = self.indexer.width
            declared[INDEX] = {
                "key": Param({"embed": d_model, "index_dim": width}, fan_in=("embed",)),
                "norm": INDEX_NORM.params(width, "index_dim"),
            }
        return declared

    def read_params(self, d_model: int) -> dict[str, Any]:
        source = {"embed": d_model}
        declared = super().read_params(d_model)
        if self.query_rank is not None:
            source = {"query_latent": self.query_rank}
            declared["query_latent"] = Param({"embed": d_model, **source}, fan_in=("embed",))
            if self.norm:
                declared["query_norm"] = self.norm.params(self.query_rank, "query_latent")
        if self.indexer and self.query_rank is not None:
            declared[INDEX] = self.indexer.params(d_model, self.query_rank)
        heads, latent = {"heads": self.heads}, {"latent": self.rank}
        return {
            **declared,
            "query": Param(
                source | heads | {"query_dim": self.query_dim}, fan_in=tuple(source), tag="query"
            ),
            "key_up": Param(
                latent | heads | {"head_dim": self.head_dim}, fan_in=("latent",), tag="key"
            ),
            "value_up": Param(
                latent | heads | {"value_dim": self.value_dim}, fan_in=("latent",), tag="value"
            ),
        }

    def write(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None = None,
    ) -> dict[str, Float[Array, "batch 1 token _"]]:
        latent = self._normed(weights, "norm", project(x, weights["latent"]))
        key = project(x, weights["key"])[:, None]
        written = {"latent": latent[:, None], "key": self.rotate(key, position[:, None])}
        if self.indexer:
            # The indexer learns from its own loss alone.
            own, x = weights[INDEX], jax.lax.stop_gradient(x)
            index = INDEX_NORM.apply(own["norm"], project(x, own["key"]))
            written[INDEX] = self._rotated_first(index[:, None], position)
        return written

    def _rotated_first(
        self, x: Float[Array, "batch heads token width"], position: Int[Array, "batch token"]
    ) -> Float[Array, "batch heads token width"]:
        """Rotate the first `rope_dim` dimensions of the indexer's queries or keys."""
        turning, still = jnp.split(x, [self.rope_dim], axis=-1)
        return jnp.concatenate([self.rotate(turning, position[:, None]), still], axis=-1)

    def _normed(self, weights: Weights, name: str, latent: Array) -> Array:
        return self.norm.apply(weights[name], latent) if self.norm else latent

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        """Project queries, each head a group of its own; the last `rope_dim` dimensions are
        rotated.
        """
        if self.query_rank is not None:
            x = self._query_latent(weights, x)
        query = project(x, weights["query"]).swapaxes(1, 2)
        still, turning = jnp.split(query, [self.head_dim], axis=-1)
        rotated = self.rotate(turning, position[:, None])
        return jnp.concatenate([still, rotated], axis=-1)[:, :, None]

    def _query_latent(
        self, weights: Weights, x: Residual
    ) -> Float[Array, "batch token query_latent"]:
        """Return the latent from which queries are projected."""
        return self._normed(weights, "query_norm", project(x, weights["query_latent"]))

    def address(self, weights: Weights, query: Queries) -> Query:
        unrotated, rotating = jnp.split(query, [self.head_dim], axis=-1)
        return unrotated, rotating

    def recall(self, weights: Weights, entries: Entries) -> Dense:
        latent = entries.tensors["latent"][:, 0]
        key = project(latent, weights["key_up"]).swapaxes(1, 2)
        value = project(latent, weights["value_up"]).swapaxes(1, 2)
        return Dense((key, entries.tensors["key"]), value)

    def indexed(self, weights: Weights, parts: Sequence[Bag], mask: Mask) -> IndexedRead:
        indexer, everywhere = self.indexer, (True,) * len(parts)
        if indexer is None:
            return IndexedRead(self, weights, everywhere, mask)

        def ask(x: Residual, position: Int[Array, "batch query"]) -> tuple[Array, Array]:
            own, x = weights[INDEX], jax.lax.stop_gradient(x)
            latent = jax.lax.stop_gradient(self._query_latent(weights, x))
            query = self._rotated_first(indexer.queries(own, latent), position)
            return query, indexer.weight(own, x)

        return IndexedRead(self, weights, everywhere, mask, indexer, ask)

    def decoding(self) -> Absorbed:
        """Return the absorbed form."""
        return Absorbed(**{f.name: getattr(self, f.name) for f in fields(self)})

    def memory(self) -> Hashable:
        parts = self.rope_dim, self.rope_parts, self.indexer and self.indexer.width
        return self.kind, self.rank, *parts, self.position.rotation()

    def pair_flops(
        self, bags: Mapping[str, EntryStore], tokens: int, most: int | None = None
    ) -> float:
        """Count the entries that are read, and with an indexer the scores of all entries."""
        if self.indexer is None:
            return super().pair_flops(bags, tokens, most)
        scored = self.indexer.flops() * sum(bag.mean_visible(tokens) for bag in bags.values())
        return scored + super().pair_flops(bags, tokens, most or self.indexer.top_k)


@dataclass(frozen=True)
class Absorbed(Latent):
    """Latent attention with the key and value projections moved to the queries and the output.

    It is the same function, since q (W c) = (q W) c; all heads read one latent c.
    """

    @property
    def key_heads(self) -> int:
        return 1

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        """Project queries as `Latent` does, with all heads in the group of the single latent."""
        return super().query(weights, x, position).swapaxes(1, 2)

    def address(self, weights: Weights, query: Queries) -> Query:
        unrotated, rotating = jnp.split(query, [self.head_dim], axis=-1)
        absorbed = jnp.einsum(
            "bghqd,lhd->bghql",
            unrotated,
            weights["key_up"].astype(query.dtype),
            preferred_element_type=jnp.float32,
        )
        return absorbed.astype(query.dtype), rotating

    def recall(self, weights: Weights, entries: Entries) -> Dense:
        latent = entries.tensors["latent"]
        return Dense((latent, entries.tensors["key"]), latent)

    def output(
        self,
        weights: Weights,
        out: Float[Array, "batch 1 heads query latent"],
        x: Residual,
        position: Int[Array, "batch query"],
    ) -> Residual:
        up = weights["value_up"].astype(out.dtype)
        value = jnp.einsum("bghql,lhv->bhqv", out, up, preferred_element_type=jnp.float32)
        return super().output(weights, value.astype(out.dtype)[:, :, None], x, position)
