"""Shared KV: one projection; values are cached, keys are the same numbers rotated when read.

Half the bytes of grouped-query attention with as many KV heads. Without `norm`, key = rotate(u)
and value = u. With it, value = u / rms(u) and key = rotate(gain * value), which is what Gemma 4's
global layers compute (with p-RoPE, p = 0.25): their keys need no cache either.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from mukv.attention.base import Attention, Queries, by_group, check_groups
from mukv.attention.entries import Entries
from mukv.attention.recalled import Dense
from mukv.core.linear import project
from mukv.core.norm import RMSNorm
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Residual, Weights


@dataclass(frozen=True)
class SharedKV(Attention):
    """norm: of queries, keys and values; gains for queries and keys alone. None for none."""

    kind: Literal["shared_kv"] = "shared_kv"
    kv_heads: int = 4
    head_dim: int = 32
    norm: RMSNorm | None = None

    sizes: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_groups(self.heads, self.kv_heads)

    @property
    def query_dim(self) -> int:
        return self.head_dim

    def write_params(self, d_model: int) -> dict[str, Param]:
        dims = {"embed": d_model, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return {"value": Param(dims, fan_in=("embed",))}

    def read_params(self, d_model: int) -> dict[str, Any]:
        dims = {"embed": d_model, "heads": self.heads, "head_dim": self.head_dim}
        declared = {"query": Param(dims, fan_in=("embed",)), **super().read_params(d_model)}
        if self.norm:
            for name in ("query_norm", "key_norm"):
                declared[name] = self.norm.params(self.head_dim, "head_dim")
        return declared

    def write(
        self, weights: Weights, x: Residual, position: Int[Array, "batch token"]
    ) -> dict[str, Float[Array, "batch kv_heads token head_dim"]]:
        value = project(x, weights["value"]).swapaxes(1, 2)
        return {"value": self.norm.unit(value) if self.norm else value}

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        query = project(x, weights["query"])
        if self.norm:
            query = self.norm.apply(weights["query_norm"], query)
        rotated = self.position.rotate(query.swapaxes(1, 2), position[:, None])
        return by_group(rotated, self.kv_heads)

    def recall(self, weights: Weights, entries: Entries) -> Dense:
        value = entries.tensors["value"]
        key = value * weights["key_norm"]["gain"].astype(value.dtype) if self.norm else value
        return Dense((self.position.rotate(key, entries.position),), value)

    def memory(self) -> Hashable:
        return self.kind, self.kv_heads, self.head_dim, self.norm
