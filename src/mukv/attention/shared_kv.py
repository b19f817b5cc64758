"""Shared KV attention: keys and values come from one projection, and only values are cached.

Keys are computed from the cached values when they are read, which halves the bytes of grouped-query
attention with as many KV heads. Without `norm`, value = u = W x and key = rotate(u). With it, value
= u / rms(u) and key = rotate(gain * value). Gemma 4's global layers compute the latter (with
p-RoPE, p = 0.25), so they can be cached this way.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

from mukv.attention.entries import Entries
from mukv.attention.grouped import Groups
from mukv.attention.mixer import Carried
from mukv.attention.recalled import Dense
from mukv.core.broadcast import with_rank
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Residual, Weights


@dataclass(frozen=True)
class SharedKV(Groups):
    """Shared KV attention: keys and values come from one projection, and only values are cached.

    norm: RMSNorm of queries, keys and values, with gains for queries and keys only; None for none
    """

    kind: Literal["shared_kv"] = "shared_kv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.norm and self.norm.centred:
            allowed = "false: values are cached without gain and bias"
            raise BadInput("norm.centred", True, allowed)

    def write_params(self, d_model: int) -> dict[str, Param]:
        dims = {"embed": d_model, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return {"value": Param(dims, fan_in=("embed",), tag="value")}

    def read_params(self, d_model: int) -> dict[str, Any]:
        declared = super().read_params(d_model)
        if self.norm:
            declared["key_norm"] = self.norm.params(self.head_dim, "head_dim")
        return declared

    def write(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None = None,
    ) -> dict[str, Float[Array, "batch kv_heads token head_dim"]]:
        value = project(x, weights["value"]).swapaxes(1, 2)
        return {"value": self.norm.unit(value) if self.norm else value}

    def recall(self, weights: Weights, entries: Entries) -> Dense:
        value = entries.tensors["value"]
        key = value
        if self.norm:
            gain = self.norm.gain(weights["key_norm"]).astype(value.dtype)
            key = value * with_rank(gain, value.ndim)
        return Dense((self.position.rotate(key, entries.position),), value)

    def memory(self) -> Hashable:
        return self.kind, self.kv_heads, self.head_dim, self.norm
