"""Grouped tied attention (Zadouri et al. 2025): keys and values share one cached tensor.

The state of a KV head is its value; the first half of the state is also the first half of its key.
The second half of all keys is one rotated vector that all heads share.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from mukv.attention.base import Attention, Queries, by_group, check_groups
from mukv.attention.entries import Entries
from mukv.attention.mixer import Carried
from mukv.attention.recalled import Dense, Query
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Residual, Weights


@dataclass(frozen=True)
class GroupedTied(Attention):
    """Grouped-query attention whose keys and values share a tensor (Zadouri et al. 2025).

    kv_heads: number of heads that keys and values have; divides heads
    head_dim: width of a head
    """

    kind: Literal["grouped_tied"] = "grouped_tied"
    kv_heads: int = 4
    head_dim: int = 32

    also: ClassVar[tuple[str, ...]] = ("gta",)
    sizes: ClassVar[tuple[str, ...]] = ("heads", "kv_heads", "head_dim")
    grows: ClassVar[tuple[str, ...]] = ("heads", "kv_heads")
    keys: ClassVar[tuple[str, ...]] = ("key",)

    def __post_init__(self) -> None:
        if self.head_dim % 2:
            raise BadInput(
                "head_dim", self.head_dim, "an even number: half of each key is tied to the value"
            )
        super().__post_init__()
        check_groups(self.heads, self.kv_heads)

    @property
    def query_dim(self) -> int:
        return self.head_dim

    @property
    def key_heads(self) -> int:
        return self.kv_heads

    @property
    def rotated_dim(self) -> int:
        return self.head_dim // 2

    def write_params(self, d_model: int) -> dict[str, Param]:
        state = {"embed": d_model, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        key = {"embed": d_model, "rope_dim": self.rotated_dim}
        return {
            "state": Param(state, fan_in=("embed",), tag="value"),
            "key": Param(key, fan_in=("embed",), tag="key"),
        }

    def read_params(self, d_model: int) -> dict[str, Any]:
        dims = {"embed": d_model, "heads": self.heads, "head_dim": self.head_dim}
        return {
            "query": Param(dims, fan_in=("embed",), tag="query"),
            **super().read_params(d_model),
        }

    def write(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None = None,
    ) -> dict[str, Float[Array, "batch _ token _"]]:
        key = project(x, weights["key"])[:, None]
        return {
            "state": project(x, weights["state"]).swapaxes(1, 2),
            "key": self.position.rotate(key, position[:, None]),
        }

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        """Project queries; the second half of each head is rotated."""
        unrotated, rotating = jnp.split(project(x, weights["query"]).swapaxes(1, 2), 2, axis=-1)
        rotated = self.position.rotate(rotating, position[:, None])
        return by_group(jnp.concatenate([unrotated, rotated], axis=-1), self.kv_heads)

    def address(self, weights: Weights, query: Queries) -> Query:
        unrotated, rotating = jnp.split(query, 2, axis=-1)
        # Zeros for the half of the state that is no key: slicing the state would copy it.
        return jnp.concatenate([unrotated, jnp.zeros_like(unrotated)], axis=-1), rotating

    def recall(self, weights: Weights, entries: Entries) -> Dense:
        state = entries.tensors["state"]
        return Dense((state, entries.tensors["key"]), state)

    def memory(self) -> Hashable:
        return self.kind, self.kv_heads, self.head_dim, self.position.rotation()
