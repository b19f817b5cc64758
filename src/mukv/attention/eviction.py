"""Gates that learn which entries attention can do without (DMS, Łańcucki et al. 2025).

Each token has one logit per KV head: x = 100 w . n - 5, where n is the layer's input divided by its
root mean square and w is a trained vector, zero at first. The logit of token t + 1 decides about
the entry of token t: if it is positive, queries more than `window` tokens after t do not read that
entry. Logits are written beside keys and values, so that a cache can decide when it is folded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mukv.attention.entries import Entries, Recall, Retrieved
from mukv.attention.recalled import Forwarding, Query
from mukv.core.counts import require_counts
from mukv.core.linear import project
from mukv.core.norm import RMSNorm
from mukv.core.params import Param
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights
from mukv.position.base import Logits

EVICTION, EVICTED = "eviction", "evicted"
"""Name of the weight and of the tensor of logits in an entry; name of the fraction in metrics."""
GAIN, OFFSET = 100.0, -5.0
UNIT = RMSNorm()
LAST = jnp.iinfo(jnp.int32).max
"""Position of the last query that may see an entry which stays."""


@dataclass(frozen=True)
class Eviction:
    """Learned eviction: one gate per token and KV head.

    window: number of tokens after an entry whose queries read it in any case
    """

    window: int = 128

    def __post_init__(self) -> None:
        require_counts(self, "window")

    def params(self, d_model: int, kv_heads: int) -> dict[str, Param]:
        """Declare the weight of the gates."""
        dims = {"embed": d_model, "kv_heads": kv_heads}
        declared = Param(dims, role="router", fan_in=("embed",), init="zeros", tag=EVICTION)
        return {EVICTION: declared}

    def write(
        self, weights: Weights, x: Residual
    ) -> dict[str, Float[Array, "batch kv_heads token 1"]]:
        """Compute the logits of tokens. x: the layer's input, after its norm"""
        wide = jnp.dtype("float32")
        logits = GAIN * project(UNIT.unit(x), weights[EVICTION], out=wide) + OFFSET
        return {EVICTION: logits.astype(x.dtype).swapaxes(1, 2)[..., None]}


def of_next(
    logits: Float[Array, "batch kv_heads token"], last: float
) -> Float[Array, "batch kv_heads token"]:
    """Return for each token the number of the token after it; `last` for the last one."""
    return jnp.pad(logits[..., 1:], [(0, 0), (0, 0), (0, 1)], constant_values=last)


def until(
    evicted: Bool[Array, "batch stores key"], position: Int[Array, "batch #stores key"], window: int
) -> Int[Array, "batch stores key"]:
    """Return the position of the last query that may see each entry."""
    return jnp.where(evicted, position + window, LAST)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Faded(Forwarding):
    """Keys and values with a number per key that is added to its logits beyond a window.

    amount: what is added, float32
    window: queries at most this many tokens after a key get its logit unchanged
    """

    amount: Float[Array, "batch kv_heads key 1"]
    window: int = field(metadata={"static": True})

    fades: ClassVar[bool] = True

    def faded(
        self,
        logits: Logits,
        query: Int[Array, "batch query"],
        key: Int[Array, "batch #kv_heads key"],
    ) -> Logits:
        beyond = query[:, None, :, None] - key[:, :, None] > self.window
        amount = self.amount[..., 0].astype(jnp.float32)[:, :, None]
        return logits + jnp.where(beyond, amount, 0.0)[:, :, None]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Fading:
    """A bag of entries that queries beyond a window read less; see `Faded`.

    reported: numbers of the layer that writes the entries; see `mukv.model.auxiliary`
    """

    entries: Entries
    amount: Float[Array, "batch kv_heads key"]
    reported: dict[str, Any]
    window: int = field(metadata={"static": True})

    def retrieve(self, query: Query, recall: Recall) -> Retrieved:
        """Return the keys and values of all entries; every query reads the same ones."""
        return Faded(recall(self.entries), self.amount[..., None], self.window), self.entries

    def taken(self, place: Int[Array, "batch 1 number"]) -> None:
        """Gather nothing: no indexer goes with gates."""
        return
