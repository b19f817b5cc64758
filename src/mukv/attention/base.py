"""Attention: a mixer whose `read` is one softmax over entries.

Training is `read(x, write(x))`; decoding appends what `write` gives for one token and reads the
lot; reuse across layers reads another layer's entries. What `write` returns is the cache: bytes
are computed from it. `read` is the same for all variants: a variant says how queries are made, what
entries recall, and what becomes of what was read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.attention import cores
from mukv.attention.entries import Bag, Entries
from mukv.attention.mask import Mask
from mukv.attention.mixer import Mixer, Reported
from mukv.attention.recalled import Query, Recalled
from mukv.core.compute import Compute
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param, tagged
from mukv.core.tap import tapped
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights
from mukv.position import AnyPosition, NoPE

Queries = Float[Array, "batch kv_heads group query query_dim"]


@dataclass(frozen=True)
class Attention(Mixer):
    """A mixer whose `read` is one softmax over all entries; a variant fills in short methods.

    position: position encoding. heads: number of query heads.
    scale: factor of the logits; 1 / sqrt(query_dim) if None. softcap: bound of the logits (Gemma
    2), None for none. sinks: "learned" gives each head a logit of its own in the softmax's sum,
    which it may attend to instead of any entry (gpt-oss). gate: what a head read is multiplied by
    sigmoid(x W), one number per head or per head and channel (Qiu et al. 2025; Qwen3-Next); None
    for no gate.
    """

    position: AnyPosition = dataclasses.field(default_factory=NoPE)
    heads: int = 4
    scale: float | None = None
    softcap: float | None = None
    sinks: Literal["learned"] | None = None
    gate: Literal["head", "channel"] | None = None

    sizes: ClassVar[tuple[str, ...]] = ("heads",)
    """Fields that are numbers of something."""
    grows: ClassVar[tuple[str, ...]] = ("heads",)
    """Fields that go with the width of the model."""
    values_apart: ClassVar[bool] = False
    """Whether values are kept in tensors of their own, which no key is made of."""
    keys: ClassVar[tuple[str, ...]] = ()
    """Names of the cached tensors that are quantised by channel, as keys are (KIVI); all others,
    latents and states that are keys and values at once included, are quantised by token."""

    def __post_init__(self) -> None:
        require_counts(self, *self.sizes, most=1 << 16)
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise BadInput(name, getattr(self, name), "greater than 0, or null")
        self.position.check(self.rotated_dim // self.rotated_parts, self.heads)
        if self.position.sequential and len(self.bags) > 1:
            allowed = "one that does not count tokens, which lie in several stores here"
            raise BadInput("position", self.position.kind, allowed)

    # What a variant answers

    @property
    def query_dim(self) -> int:
        """Width of a query and a key."""
        raise NotImplementedError

    @property
    def value_dim(self) -> int:
        """Width of what a head reads."""
        return self.query_dim

    @property
    def rotated_dim(self) -> int:
        """Width of what a position encoding rotates."""
        return self.query_dim

    @property
    def rotated_parts(self) -> int:
        """Equal pieces of that width, each of which is rotated as a head of its own."""
        return 1

    def rotate(
        self,
        x: Float[Array, "batch heads token rotated_dim"],
        position: Int[Array, "batch #heads token"],
    ) -> Float[Array, "batch heads token rotated_dim"]:
        """Rotate the rotated dimensions of queries or keys by their positions."""
        if self.rotated_parts == 1:
            return self.position.rotate(x, position)
        pieces = jnp.split(x, self.rotated_parts, axis=-1)
        return jnp.concatenate([self.position.rotate(p, position) for p in pieces], axis=-1)

    def read_params(self, d_model: int) -> dict[str, Any]:
        """Weights that turn a token into a query, and what it read into the residual stream.

        A variant adds its own to these.
        """
        declared = self.output_params(d_model)
        if self.gate:
            dims = {"embed": d_model, "heads": self.heads}
            dims |= {"value_dim": self.value_dim} if self.gate == "channel" else {}
            declared["gate"] = Param(dims, fan_in=("embed",), tag="gate")
        if position := self.position.params(self.query_dim, self.heads):
            declared["position"] = position
        if self.sinks:
            declared["sinks"] = Param({"heads": self.heads}, role="vector", init="zeros")
        return declared

    def output_params(self, d_model: int) -> dict[str, Any]:
        """Weights that turn what the heads read into the residual stream."""
        dims = {"heads": self.heads, "value_dim": self.value_dim, "embed": d_model}
        return {"output": Param(dims, fan_in=("heads", "value_dim"), ends_branch=True)}

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        """What each token looks for."""
        raise NotImplementedError

    def address(self, weights: Weights, query: Queries) -> Query:
        """A query in the pieces that the recalled keys have."""
        return (query,)

    def recall(self, weights: Weights, entries: Entries) -> Recalled:
        """Keys and values of entries."""
        raise NotImplementedError

    def choose(
        self, weights: Weights, x: Residual, position: Int[Array, "batch query"], entries: Entries
    ) -> Bool[Array, "batch #kv_heads query key"] | None:
        """Which entries of a bag each query may read, of those that the mask leaves; None for all.

        Where it is not None, all logits of the bag exist at once.
        """
        return None

    def output(
        self,
        weights: Weights,
        out: Float[Array, "batch kv_heads group query width"],
        x: Residual,
        position: Int[Array, "batch query"],
    ) -> Residual:
        """What was read, as it is added to the residual stream. x: what made the queries."""
        heads = self.gated(weights, by_token(out), x)
        return project(heads, weights["output"], contracted=2)

    # What all have in common

    def read(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        mask: Mask,
        compute: Compute,
    ) -> tuple[Residual, Reported]:
        """What each query makes of the entries that it may see, in one softmax over all parts.

        parts: in the order of their positions. compute: decides which cores may be taken.
        """
        address, scores = self.asked(weights, self.query(weights, x, position), position)
        found = [part.retrieve(address, partial(self.recall, weights)) for part in parts]
        chosen = [self.choose(weights, x, position, entries) for _, entries in found]
        shown = [
            cores.Part(keys, entries, mask.of(entries, which))
            for (keys, entries), which in zip(found, chosen, strict=True)
        ]
        ordered = all(part.entries.ordered for part in shown)
        picks = any(which is not None for which in chosen)
        shows = tapped() or ("each query chooses its entries" if picks else None)
        core = self.core(x.shape[1], compute, ordered, shows).core
        out = core.apply(address, shown, scores)
        return self.output(weights, out, x, position), None

    def core(
        self, queries: int, compute: Compute, ordered: bool = True, shows: str | None = None
    ) -> cores.CoreChoice:
        return cores.choose(cores.Demand(queries, self.position, ordered, shows), compute)

    def asked(
        self, weights: Weights, query: Queries, position: Int[Array, "batch query"]
    ) -> tuple[Query, cores.Scores]:
        """Queries as they are multiplied with keys, and what becomes of the products."""
        own = weights.get("position", {})
        query = self.position.temper(own, query, position)
        scale = (self.scale or self.query_dim**-0.5) * self.position.logit_factor
        query = query * jnp.asarray(scale, query.dtype)
        sinks = weights["sinks"].reshape(query.shape[1:3]) if self.sinks else None
        scores = cores.Scores(query, position, own, sinks, self.position, scale, self.softcap)
        return self.address(weights, query), scores

    def gated(
        self, weights: Weights, heads: Float[Array, "batch query heads value_dim"], x: Residual
    ) -> Float[Array, "batch query heads value_dim"]:
        """What the heads read, times its gate."""
        if self.gate is None:
            return heads
        share = jax.nn.sigmoid(project(x, weights["gate"], out=jnp.dtype("float32")))
        return (heads * (share if self.gate == "channel" else share[..., None])).astype(heads.dtype)

    def decoding(self) -> Attention:
        """The form that reads a cache."""
        return self

    @property
    def key_heads(self) -> int:
        """Heads that keys have, as queries see them."""
        return self.heads

    @property
    def entry_sets(self) -> int:
        """Sets of entries that a policy may choose separately: KV heads, or 1 if they share a
        tensor."""
        return 1

    def logit_weight(self, d_model: int) -> Param:
        return tagged(self.read_params(d_model), "query")

    def read_flops(self) -> int:
        return 2 * self.heads * (self.query_dim + self.value_dim)


def check_groups(heads: int, kv_heads: int) -> None:
    """Raise BadInput unless query heads share KV heads evenly."""
    if heads % kv_heads == 0:
        return
    divisors = [n for n in range(1, heads + 1) if heads % n == 0]
    raise BadInput(
        "kv_heads",
        kv_heads,
        f"must divide heads ({heads}): one of {', '.join(map(str, divisors))}",
        str(min(divisors, key=lambda n: abs(n - kv_heads))),
    )


def by_token(
    out: Float[Array, "batch kv_heads group query width"],
) -> Float[Array, "batch query heads width"]:
    """What the heads read, token by token."""
    batch, kv_heads, group, length, width = out.shape
    return out.reshape(batch, kv_heads * group, length, width).swapaxes(1, 2)


def by_group(query: Float[Array, "batch heads query query_dim"], kv_heads: int) -> Queries:
    """Query heads, those that share a KV head together."""
    batch, _, length, width = query.shape
    return query.reshape(batch, kv_heads, -1, length, width)
