"""Grouped-query attention (Ainslie et al. 2023): query heads share keys and values in groups.

Each group has heads / kv_heads query heads. kv_heads = heads is multi-head attention (Vaswani et
al. 2017), kv_heads = 1 is multi-query attention (Shazeer 2019). Keys are cached rotated.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from mukv.attention.base import Attention, Queries, by_group, check_groups
from mukv.attention.entries import Entries
from mukv.attention.eviction import Eviction
from mukv.attention.mixer import Carried
from mukv.attention.recalled import Dense
from mukv.core.errors import BadInput
from mukv.core.linear import project, with_bias
from mukv.core.norm import RMSNorm
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Residual, Weights


@dataclass(frozen=True)
class Groups(Attention):
    """Base class of attention whose query heads share KV heads, whatever the cache stores.

    kv_heads: number of heads that keys and values have; divides heads
    head_dim: width of a head
    norm: RMSNorm of queries and keys, per head, before they are rotated (QK norm); None for none
    """

    kv_heads: int = 4
    head_dim: int = 32
    norm: RMSNorm | None = None

    sizes: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim")
    grows: ClassVar[tuple[str, ...]] = ("heads", "kv_heads")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self.heads, self.kv_heads)

    @property
    def query_dim(self) -> int:
        return self.head_dim

    @property
    def key_heads(self) -> int:
        return self.kv_heads

    @property
    def entry_sets(self) -> int:
        return self.kv_heads

    def read_params(self, d_model: int) -> dict[str, Any]:
        dims = {"embed": d_model, "heads": self.heads, "head_dim": self.head_dim}
        declared = {
            "query": Param(dims, fan_in=("embed",), tag="query"),
            **super().read_params(d_model),
        }
        if self.norm:
            declared["query_norm"] = self.norm_params(self.norm, "heads")
        return declared

    def norm_params(self, norm: RMSNorm, heads: str) -> dict[str, Param]:
        """Declare the norm of queries or keys. heads: name of their axis of heads."""
        return norm.params(self.head_dim, "head_dim")

    def apply_norm(
        self, norm: RMSNorm, weights: dict[str, Any], x: Float[Array, "batch token heads head_dim"]
    ) -> Float[Array, "batch token heads head_dim"]:
        """Normalise queries or keys."""
        return norm.apply(weights, x)

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        query = self.project_query(weights, x)
        if self.norm:
            query = self.apply_norm(self.norm, weights["query_norm"], query)
        rotated = self.position.rotate(query.swapaxes(1, 2), position[:, None])
        return by_group(rotated, self.kv_heads)

    def project_query(
        self, weights: Weights, x: Residual
    ) -> Float[Array, "batch token heads head_dim"]:
        """Project tokens to query heads."""
        return project(x, weights["query"])


@dataclass(frozen=True)
class Grouped(Groups):
    """Grouped-query attention (Ainslie et al. 2023): query heads share keys and values in groups.

    norm_over: what the QK norm averages over: each head, or all heads of a projection (OLMo 2)
    norm_values: whether values are normalised too, each head by itself and without a gain (Gemma 4)
    biases: projections that have a bias (Qwen 2: query, key and value)
    eviction: learned gates that decide which entries later queries do without, under the cache
        policy `dms` and while they are trained (DMS); None for none
    """

    kind: Literal["grouped"] = "grouped"
    norm_over: Literal["head", "projection"] = "head"
    norm_values: bool = False
    biases: tuple[Literal["query", "key", "value", "output"], ...] = ()
    eviction: Eviction | None = None

    values_apart: ClassVar[bool] = True
    also: ClassVar[tuple[str, ...]] = ("mha", "gqa", "mqa", "attention")
    keys: ClassVar[tuple[str, ...]] = ("key",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm is None and self.norm_over != "head":
            raise BadInput("norm_over", self.norm_over, "head where norm is null")
        if self.norm is None and self.norm_values:
            raise BadInput("norm_values", True, "false where norm is null")
        if self.eviction is not None and self.position.sequential:
            allowed = f"null with {self.position.kind}, whose bias depends on all keys between"
            raise BadInput("eviction", "gates", allowed)

    def norm_params(self, norm: RMSNorm, heads: str) -> dict[str, Param]:
        if self.norm_over == "head":
            return super().norm_params(norm, heads)
        return norm.params_over({heads: getattr(self, heads), "head_dim": self.head_dim})

    def apply_norm(self, norm: RMSNorm, weights: dict[str, Any], x: Array) -> Array:
        if self.norm_over == "head":
            return super().apply_norm(norm, weights, x)
        return norm.apply_over(weights, x)

    def read_params(self, d_model: int) -> dict[str, Any]:
        declared = super().read_params(d_model)
        if "query" in self.biases:
            declared["query_bias"] = _bias({"heads": self.heads, "head_dim": self.head_dim})
        if "output" in self.biases:
            declared["output_bias"] = replace(_bias({"embed": d_model}), ends_branch=True)
        return declared

    def write_params(self, d_model: int) -> dict[str, Any]:
        dims = {"embed": d_model, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        declared: dict[str, Any] = {
            "key": Param(dims, fan_in=("embed",), tag="key"),
            "value": Param(dims, fan_in=("embed",), tag="value"),
        }
        if self.norm:
            declared["key_norm"] = self.norm_params(self.norm, "kv_heads")
        for name in ("key", "value"):
            if name in self.biases:
                bias = _bias({"kv_heads": self.kv_heads, "head_dim": self.head_dim})
                declared[f"{name}_bias"] = bias
        if self.eviction is not None:
            declared |= self.eviction.params(d_model, self.kv_heads)
        return declared

    def project_query(self, weights: Weights, x: Residual) -> Array:
        return with_bias(super().project_query(weights, x), weights, "query_bias")

    def output(
        self,
        weights: Weights,
        out: Float[Array, "batch kv_heads group query width"],
        x: Residual,
        position: Int[Array, "batch query"],
    ) -> Residual:
        return with_bias(super().output(weights, out, x, position), weights, "output_bias")

    def write(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None = None,
    ) -> dict[str, Float[Array, "batch kv_heads token _"]]:
        key, value = (
            with_bias(project(x, weights[name]), weights, f"{name}_bias")
            for name in ("key", "value")
        )
        if self.norm:
            key = self.apply_norm(self.norm, weights["key_norm"], key)
            value = self.norm.unit(value) if self.norm_values else value
        rotated = self.position.rotate(key.swapaxes(1, 2), position[:, None])
        gates = {} if self.eviction is None else self.eviction.write(weights, x)
        return {"key": rotated, "value": value.swapaxes(1, 2), **gates}

    def recall(self, weights: Weights, entries: Entries) -> Dense:
        return Dense((entries.tensors["key"],), entries.tensors["value"])

    def memory(self) -> Hashable:
        return self.kind, self.kv_heads, self.head_dim, self.position.rotation(), self.eviction


def _bias(dims: dict[str, int]) -> Param:
    return Param(dims, role="vector", init="zeros")
