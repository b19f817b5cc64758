"""What becomes of the tokens of a chunk: one vector, made of at most its last `span` tokens.

A reduction sees the tokens in their order, the last one last, and which of them are there. Rows and
single steps use the same function, so that no running sums are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp

from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param
from mukv.core.table import Component, PartTable
from mukv.core.typing import Array, Bool, Float, Weights

Window = Float[Array, "batch concept span embed"]
Pooled = Float[Array, "batch concept embed"]
Present = Bool[Array, "batch concept span"]


@dataclass(frozen=True)
class Pool(Component):
    """The contract."""

    def reach(self, span: int) -> int:
        """Tokens that it looks at."""
        return span

    def check(self, d_model: int, span: int) -> None:
        """Raise BadInput for sizes that can't work."""

    def params(self, d_model: int, span: int) -> dict[str, Param]:
        return {}

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        """One vector for each concept. What is not present is zero in the window."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sum(Pool):
    """Over the root of how many they are, so that its size does not grow with the chunk."""

    kind: Literal["sum"] = "sum"

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        return jnp.sum(window, axis=2) * _root(present, window.dtype)


@dataclass(frozen=True)
class Max(Pool):
    """The largest number in each place of the vector."""

    kind: Literal["max"] = "max"

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        least = jnp.finfo(window.dtype).min
        return jnp.max(jnp.where(present[..., None], window, least), axis=2)


@dataclass(frozen=True)
class Weighted(Pool):
    """A sum with a learned weight for each place, counted from the end; weights begin at one."""

    kind: Literal["weighted"] = "weighted"

    def params(self, d_model: int, span: int) -> dict[str, Param]:
        return {"places": Param({"place": span}, role="vector", init="ones")}

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        places = weights["places"].astype(window.dtype)[None, None, ::-1, None]
        return jnp.sum(window * places, axis=2) * _root(present, window.dtype)


@dataclass(frozen=True)
class Attend(Pool):
    """A mean, weighted by the softmax of learned scores."""

    kind: Literal["attention"] = "attention"

    def params(self, d_model: int, span: int) -> dict[str, Param]:
        return {"score": Param({"embed": d_model, "one": 1}, role="readout", fan_in=("embed",))}

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        scores = project(window, weights["score"], out=jnp.dtype("float32"))[..., 0]
        share = jax.nn.softmax(jnp.where(present, scores, -jnp.inf), axis=-1)
        return jnp.sum(window * share[..., None].astype(window.dtype), axis=2)


@dataclass(frozen=True)
class Concatenate(Pool):
    """The last token, and beside it a narrow view of each in its order (Block Transformer, Ho et
    al. 2024, "lookup")."""

    kind: Literal["concatenate"] = "concatenate"

    def check(self, d_model: int, span: int) -> None:
        if d_model % span:
            allowed = f"a span that divides d_model ({d_model}): each token has its share of it"
            raise BadInput("pool", f"concatenate, {span} tokens", allowed)

    def params(self, d_model: int, span: int) -> dict[str, Param]:
        dims = {"embed": d_model, "share": d_model // span}
        return {"narrow": Param(dims, fan_in=("embed",))}

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        seen = project(window, weights["narrow"])
        return window[:, :, -1] + seen.reshape(*seen.shape[:2], -1)


@dataclass(frozen=True)
class SelectPool(Pool):
    """The last token, which has seen the others (H-Net)."""

    kind: Literal["select"] = "select"

    def reach(self, span: int) -> int:
        return 1

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        return window[:, :, -1]


def _root(present: Present, dtype: Any) -> Float[Array, "batch concept 1"]:
    count = jnp.maximum(jnp.sum(present, axis=2), 1)
    return jax.lax.rsqrt(count.astype(jnp.float32))[..., None].astype(dtype)


POOLS = PartTable(
    "reduction",
    Pool,
    {
        "sum": Sum,
        "max": Max,
        "weighted": Weighted,
        "attention": Attend,
        "concatenate": Concatenate,
        "select": SelectPool,
    },
)
AnyPool = Annotated[Pool, POOLS]
