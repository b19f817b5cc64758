"""Grouped-query attention (Ainslie et al. 2023): heads / kv_heads query heads share a key and a
value. kv_heads = heads is multi-head attention (Vaswani et al. 2017), kv_heads = 1 is
multi-query attention (Shazeer 2019). Keys are cached rotated.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp

from mukv.attention import cores
from mukv.attention.base import Attention
from mukv.attention.entries import Entries
from mukv.attention.mask import Mask
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Residual, Weights


@dataclass(frozen=True)
class Grouped(Attention):
    kind: Literal["grouped"] = "grouped"
    heads: int = 4
    kv_heads: int = 4
    head_dim: int = 32
    scale: float | None = None
    """Factor of the logits; 1 / sqrt(head_dim) if None."""

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise BadInput(name, getattr(self, name), "at least 1")
        if self.heads % self.kv_heads:
            divisors = [n for n in range(1, self.heads + 1) if self.heads % n == 0]
            raise BadInput(
                "kv_heads",
                self.kv_heads,
                f"must divide heads ({self.heads}): one of {', '.join(map(str, divisors))}",
                str(min(divisors, key=lambda n: abs(n - self.kv_heads))),
            )
        if self.scale is not None and self.scale <= 0:
            raise BadInput("scale", self.scale, "greater than 0, or null for 1/sqrt(head_dim)")
        self.position.check(self.head_dim, self.heads)

    def write_params(self, d_model: int) -> dict[str, Param]:
        dims = {"embed": d_model, "kv_heads": self.kv_heads, "head_dim": self.head_dim}
        return {name: Param(dims, fan_in=("embed",)) for name in ("key", "value")}

    def read_params(self, d_model: int) -> dict[str, Any]:
        inner = {"heads": self.heads, "head_dim": self.head_dim}
        declared: dict[str, Any] = {
            "query": Param({"embed": d_model, **inner}, fan_in=("embed",)),
            "output": Param({**inner, "embed": d_model}, fan_in=("heads", "head_dim")),
        }
        position = self.position.params(self.head_dim, self.heads)
        return {**declared, "position": position} if position else declared

    def write(
        self, weights: Weights, x: Residual, position: Int[Array, "batch token"]
    ) -> dict[str, Float[Array, "batch kv_heads token head_dim"]]:
        key = project(x, weights["key"]).swapaxes(1, 2)
        value = project(x, weights["value"]).swapaxes(1, 2)
        return {"key": self.position.rotate(key, position[:, None]), "value": value}

    def read(
        self,
        weights: Weights,
        x: Float[Array, "batch query embed"],
        position: Int[Array, "batch query"],
        parts: Sequence[Entries],
        mask: Mask,
        fused: bool = False,
    ) -> Float[Array, "batch query embed"]:
        query = project(x, weights["query"]).swapaxes(1, 2)
        query = self.position.rotate(query, position[:, None])
        batch, _, length, _ = query.shape
        query = query.reshape(batch, self.kv_heads, -1, length, self.head_dim)
        scale = self.head_dim**-0.5 if self.scale is None else self.scale
        if fused:
            (entries,) = parts
            key, value = entries.tensors["key"], entries.tensors["value"]
            out = cores.fused(query, entries, key, value, position, mask, scale)
        else:
            shown = [
                cores.Part(p.tensors["key"], p.tensors["value"], mask.visible(position, p))
                for p in parts
            ]
            out = cores.plain(query, shown, scale, self._bias(weights, query, position, parts))
        out = out.reshape(batch, self.heads, length, self.head_dim)
        return project(out.swapaxes(1, 2), weights["output"], contracted=2)

    def _bias(
        self,
        weights: Weights,
        query: Array,
        position: Int[Array, "batch query"],
        parts: Sequence[Entries],
    ) -> Any:
        if not self.position.biases:
            return None
        return partial(
            self.position.bias,
            weights.get("position", {}),
            query=query,
            query_position=position[:, None],
            key_position=jnp.concatenate([part.position for part in parts], axis=-1),
        )

    def memory(self) -> Hashable:
        return (self.kind, self.kv_heads, self.head_dim, self.position)

    def read_flops(self) -> int:
        return 4 * self.heads * self.head_dim
