"""Pooling: reduction of the tokens of a chunk to one vector.

A pooling function takes the last `span` tokens of a chunk in their order, and a mask of those that
exist. Whole rows and single steps use the same function, so that no running sums are stored.
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
    """Base class of pooling."""

    def reach(self, span: int) -> int:
        """Return the number of tokens that are pooled, of at most `span`."""
        return span

    def check(self, d_model: int, span: int) -> None:
        """Raise BadInput for sizes that don't fit."""

    def params(self, d_model: int, span: int) -> dict[str, Param]:
        """Declare the weights."""
        return {}

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        """Compute one vector per concept. The window is zero where `present` is false."""
        raise NotImplementedError


@dataclass(frozen=True)
class Sum(Pool):
    """Sum divided by the square root of the number of tokens, so that its scale does not grow."""

    kind: Literal["sum"] = "sum"

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        return jnp.sum(window, axis=2) * _inverse_root(present, window.dtype)


@dataclass(frozen=True)
class Max(Pool):
    """Maximum of each channel."""

    kind: Literal["max"] = "max"

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        least = jnp.finfo(window.dtype).min
        return jnp.max(jnp.where(present[..., None], window, least), axis=2)


@dataclass(frozen=True)
class Weighted(Pool):
    """Sum with one learned weight per place, counted from the end; initial weights are 1.

    It is divided by the square root of the number of tokens.
    """

    kind: Literal["weighted"] = "weighted"

    def params(self, d_model: int, span: int) -> dict[str, Param]:
        return {"places": Param({"place": span}, role="vector", init="ones")}

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        places = weights["places"].astype(window.dtype)[None, None, ::-1, None]
        return jnp.sum(window * places, axis=2) * _inverse_root(present, window.dtype)


@dataclass(frozen=True)
class Attend(Pool):
    """Mean weighted by the softmax of learned scores."""

    kind: Literal["attention"] = "attention"

    def params(self, d_model: int, span: int) -> dict[str, Param]:
        return {"score": Param({"embed": d_model, "one": 1}, role="readout", fan_in=("embed",))}

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        scores = project(window, weights["score"], out=jnp.dtype("float32"))[..., 0]
        share = jax.nn.softmax(jnp.where(present, scores, -jnp.inf), axis=-1)
        return jnp.sum(window * share[..., None].astype(window.dtype), axis=2)


@dataclass(frozen=True)
class Concatenate(Pool):
    """Last token plus the concatenation of a narrow projection of each token, in order.

    It follows the "lookup" of Block Transformer (Ho et al. 2024).
    """

    kind: Literal["concatenate"] = "concatenate"

    def check(self, d_model: int, span: int) -> None:
        if d_model % span:
            allowed = f"a span that divides d_model ({d_model}), which is split among the tokens"
            raise BadInput("pool", f"concatenate, {span} tokens", allowed)

    def params(self, d_model: int, span: int) -> dict[str, Param]:
        dims = {"embed": d_model, "share": d_model // span}
        return {"narrow": Param(dims, fan_in=("embed",))}

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        seen = project(window, weights["narrow"])
        return window[:, :, -1] + seen.reshape(*seen.shape[:2], -1)


@dataclass(frozen=True)
class SelectPool(Pool):
    """The last token, which has attended to the other tokens of its chunk (H-Net)."""

    kind: Literal["select"] = "select"

    def reach(self, span: int) -> int:
        return 1

    def apply(self, weights: Weights, window: Window, present: Present) -> Pooled:
        return window[:, :, -1]


def _inverse_root(present: Present, dtype: Any) -> Float[Array, "batch concept 1"]:
    """Return 1 / sqrt(number of tokens) for each concept."""
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
