"""Grouped-query attention (Ainslie et al. 2023): heads / kv_heads query heads share a key and a
value. kv_heads = heads is multi-head attention (Vaswani et al. 2017), kv_heads = 1 is
multi-query attention (Shazeer 2019). Keys are cached rotated.
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
class Groups(Attention):
    """Query heads that share KV heads, whatever these remember.

    norm: of queries and keys, per head, before they are rotated (QK norm); None for none.
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

    def read_params(self, d_model: int) -> dict[str, Any]:
        dims = {"embed": d_model, "heads": self.heads, "head_dim": self.head_dim}
        declared = {"query": Param(dims, fan_in=("embed",)), **super().read_params(d_model)}
        if self.norm:
            declared["query_norm"] = self.norm.params(self.head_dim, "head_dim")
        return declared

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        query = project(x, weights["query"])
        if self.norm:
            query = self.norm.apply(weights["query_norm"], query)
        rotated = self.position.rotate(query.swapaxes(1, 2), position[:, None])
        return by_group(rotated, self.kv_heads)


@dataclass(frozen=True)
class Grouped(Groups):
    kind: Literal["grouped"] = "grouped"

    def write_params(self, d_model: int) -> dict[str, Any]:
        dims = {"embed": d_model, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        declared: dict[str, Any] = {
            name: Param(dims, fan_in=("embed",)) for name in ("key", "value")
        }
        if self.norm:
            declared["key_norm"] = self.norm.params(self.head_dim, "head_dim")
        return declared

    def write(
        self, weights: Weights, x: Residual, position: Int[Array, "batch token"]
    ) -> dict[str, Float[Array, "batch kv_heads token head_dim"]]:
        key = project(x, weights["key"]).swapaxes(1, 2)
        value = project(x, weights["value"]).swapaxes(1, 2)
        if self.norm:
            key = self.norm.apply(weights["key_norm"], key)
        return {"key": self.position.rotate(key, position[:, None]), "value": value}

    def recall(self, weights: Weights, entries: Entries) -> Dense:
        return Dense((entries.tensors["key"],), entries.tensors["value"])

    def memory(self) -> Hashable:
        return self.kind, self.kv_heads, self.head_dim, self.position.rotation()
