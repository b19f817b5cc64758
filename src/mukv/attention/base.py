"""Attention: a mixer whose `read` is one softmax over entries.

In training, `read` attends to the entries that `write` made from the same tokens. In decoding, the
entries of each new token are appended to the cache, and `read` attends to the whole cache. A layer
that reuses another layer's entries has no `write`. The cache holds exactly what `write` returns, so
its size in bytes is computed from there. All variants share `read`; a variant defines how queries
are made, how entries become keys and values, and how the result is projected.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.attention import cores
from mukv.attention.entries import Bag, Entries
from mukv.attention.indexer import among_bags
from mukv.attention.mask import Mask
from mukv.attention.mixer import Mixer, Reported, Tensors
from mukv.attention.recalled import Query, Recalled
from mukv.core.compute import Compute
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param, abstract, tagged
from mukv.core.tap import tapped
from mukv.core.typing import Array, Float, Int, Residual, Weights
from mukv.position import AnyPosition, NoPE

Queries = Float[Array, "batch kv_heads group query query_dim"]


@dataclass(frozen=True)
class Attention(Mixer):
    """Base class of attention: a mixer whose `read` is one softmax over all visible entries.

    The fields are the YAML keys. A variant implements the methods that raise NotImplementedError.

    position: position encoding
    heads: number of query heads
    scale: factor of the logits; 1 / sqrt(query_dim) if None
    softcap: bound of the logits, softcap * tanh(logit / softcap) (Gemma 2); None for none
    sinks: "learned" adds one trained logit per head to the softmax, which takes probability and
        contributes no value (gpt-oss); None for none
    gate: multiply the output of each head by sigmoid(x W), one number per head or per head and
        channel (Qiu et al. 2025; Qwen3-Next); None for no gate

    Raises BadInput for values that don't fit each other or the position encoding.
    """

    position: AnyPosition = dataclasses.field(default_factory=NoPE)
    heads: int = 4
    scale: float | None = None
    softcap: float | None = None
    sinks: Literal["learned"] | None = None
    gate: Literal["head", "channel"] | None = None

    sizes: ClassVar[tuple[str, ...]] = ("heads",)
    grows: ClassVar[tuple[str, ...]] = ("heads",)
    values_apart: ClassVar[bool] = False
    """Whether values are stored in tensors of their own, from which no key is computed."""
    keys: ClassVar[tuple[str, ...]] = ()
    """Names of the cached tensors that are quantised by channel, as KIVI quantises keys.

    All other tensors are quantised by token; these include latents and states that serve as keys
    and values at once.
    """

    def __post_init__(self) -> None:
        require_counts(self, *self.sizes, most=1 << 16)
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise BadInput(name, getattr(self, name), "greater than 0, or null")
        self.position.check(self.rotated_dim // self.rotated_parts, self.heads)
        if self.position.sequential and len(self.bags) > 1:
            allowed = (
                "an encoding whose bias does not depend on the keys between query and key: "
                "this attention has several stores"
            )
            raise BadInput("position", self.position.kind, allowed)

    # Methods of a variant

    @property
    def query_dim(self) -> int:
        """Width of a query and of a key."""
        raise NotImplementedError

    @property
    def value_dim(self) -> int:
        """Width of the output of one head."""
        return self.query_dim

    @property
    def rotated_dim(self) -> int:
        """Number of dimensions per head that the position encoding rotates."""
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
        """Declare the weights of queries, gate, position encoding, sinks and output.

        A variant adds the weights of its queries.
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
        """Declare the weights that project the outputs of the heads to the residual stream."""
        dims = {"heads": self.heads, "value_dim": self.value_dim, "embed": d_model}
        return {"output": Param(dims, fan_in=("heads", "value_dim"), ends_branch=True)}

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        """Return the queries of tokens x at these positions (rotated, not yet scaled)."""
        raise NotImplementedError

    def address(self, weights: Weights, query: Queries) -> Query:
        """Split queries into the pieces that the recalled keys consist of."""
        return (query,)

    def recall(self, weights: Weights, entries: Entries) -> Recalled:
        """Compute the keys and values of entries."""
        raise NotImplementedError

    def output(
        self,
        weights: Weights,
        out: Float[Array, "batch kv_heads group query width"],
        x: Residual,
        position: Int[Array, "batch query"],
    ) -> Residual:
        """Project the outputs of the heads to the residual stream.

        out: mixtures of values, with the width that `recall` gives values
        x: tokens that the queries were made from, for the gate
        position: positions of the queries
        """
        heads = self.gated(weights, by_token(out), x)
        return project(heads, weights["output"], contracted=2)

    # Shared methods

    def read(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        mask: Mask,
        compute: Compute,
        direct: Tensors | None = None,
    ) -> tuple[Residual, Reported]:
        """Attend from each token to the entries that it may see, in one softmax over all bags.

        parts: bags of entries, in the order of their positions
        mask: which entries each query sees; the window of each bag limits it further. Without a
            choice, this layer chooses
        compute: settings from which the attention core is chosen

        Returns what is added to the residual stream, and auxiliary numbers or None.
        """
        if mask.choice is None:
            mask = replace(mask, choice=self.choose(weights, x, position, parts, mask, compute))
        form = self if mask.aligned else self.decoding()
        return form.attend(weights, x, position, parts, mask, compute)

    def attend(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        mask: Mask,
        compute: Compute,
    ) -> tuple[Residual, Reported]:
        """Attend as `read` does, to the entries of `mask.choice` alone if there is one."""
        address, scores = self.scaled_queries(weights, self.query(weights, x, position), position)
        retrieved = [part.retrieve(address, partial(self.recall, weights)) for part in parts]
        chosen = among_bags(mask.choice, [entries for _, entries in retrieved])
        masked = [
            cores.Part(keys, entries, replace(mask.of(entries), chosen=own, choice=None))
            for (keys, entries), own in zip(retrieved, chosen, strict=True)
        ]
        ordered = all(part.entries.ordered for part in masked)
        aligned = len(masked) == 1 and masked[0].mask.aligned
        dropped = any(part.entries.until is not None or part.recalled.fades for part in masked)
        shows = tapped() or (None if mask.choice is None else "each query chooses its entries")
        context = cores.context_of(x.shape[1]) if mask.aligned else 1
        unread = cores.unread(address[0].shape, masked, compute)
        demand = (ordered, shows, aligned, dropped, context, unread)
        core = self.core(x.shape[1], compute, *demand).core
        apply = partial(cores.over_context, core) if mask.aligned else core.apply
        out = apply(address, masked, scores)
        return self.output(weights, out, x, position), None

    def core(
        self,
        queries: int,
        compute: Compute,
        ordered: bool = True,
        shows: str | None = None,
        aligned: bool = False,
        dropped: bool = False,
        context: int = 1,
        unread: str | None = cores.UNKNOWN,
    ) -> cores.CoreChoice:
        """Choose the fastest attention core that supports these arguments; see `Mixer.core`."""
        about = (ordered, shows, aligned, dropped, context, unread)
        demand = cores.Demand(queries, self.position, *about)
        return cores.choose(demand, compute)

    def step_core(self, d_model: int, compute: Compute) -> cores.CoreChoice:
        form, unread = self.decoding(), list[str | None]()
        shape = (1, form.key_heads, form.heads // form.key_heads, 1, form.query_dim)

        def read(weights: Weights, written: dict[str, Tensors]) -> None:
            parts = []
            for name in form.bags:
                entries = Entries(written[name], jnp.zeros((1, 1, 1), jnp.int32))
                parts.append(cores.Part(form.recall(weights, entries), entries, Mask()))
            unread.append(cores.unread(shape, parts, compute))

        weights = abstract(form.read_params(d_model), compute.type)
        jax.eval_shape(read, weights, form.written(d_model, 1, 1, compute.type))
        return form.core(1, compute, unread=unread[0])

    def scaled_queries(
        self, weights: Weights, query: Queries, position: Int[Array, "batch query"]
    ) -> tuple[Query, cores.Scores]:
        """Return the scaled queries, split by `address`, and how their products become logits."""
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
        """Multiply the outputs of the heads by the gate, if there is one.

        heads: outputs of the heads. x: tokens that the gate is computed from.
        """
        if self.gate is None:
            return heads
        share = jax.nn.sigmoid(project(x, weights["gate"], out=jnp.dtype("float32")))
        return (heads * (share if self.gate == "channel" else share[..., None])).astype(heads.dtype)

    def decoding(self) -> Attention:
        """Return the form of this attention that reads a cache in decoding."""
        return self

    @property
    def key_heads(self) -> int:
        """Number of key heads that queries are grouped by."""
        return self.heads

    @property
    def entry_sets(self) -> int:
        """Independently evictable stores per layer: kv_heads, or 1 if heads share a tensor."""
        return 1

    def logit_weight(self, d_model: int) -> Param:
        """Return the weight that makes queries; its last axis is the width of a query."""
        return tagged(self.read_params(d_model), "query")

    def read_flops(self) -> int:
        """Return the operations of query-key products and mixtures, per query and visible entry."""
        return 2 * self.heads * (self.query_dim + self.value_dim)


def check_groups(heads: int, kv_heads: int) -> None:
    """Raise BadInput unless kv_heads divides heads."""
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
    """Reorder outputs by token, with all query heads along one axis."""
    batch, kv_heads, group, length, width = out.shape
    return out.reshape(batch, kv_heads * group, length, width).swapaxes(1, 2)


def by_group(query: Float[Array, "batch heads query query_dim"], kv_heads: int) -> Queries:
    """Reorder queries by KV head: [batch heads query query_dim] to the axes of `Queries`."""
    batch, _, length, width = query.shape
    return query.reshape(batch, kv_heads, -1, length, width)
