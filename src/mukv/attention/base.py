"""A memory is what a token writes and how a query reads it.

Every attention variant is two functions. Training is `read(x, write(x))`; decoding appends what
`write` gives for one token and reads the lot; reuse across layers reads another layer's entries.
What `write` returns is the cache: bytes are computed from it. `read` is the same for all: a
variant says how queries are made, what entries recall, and what becomes of what was read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.attention import cores
from mukv.attention.entries import Bag, Entries
from mukv.attention.mask import Mask
from mukv.attention.recalled import Query, Recalled
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param, abstract
from mukv.core.table import Part
from mukv.core.typing import Array, Float, Int, Residual, Weights
from mukv.position import AnyPosition, NoPE

Queries = Float[Array, "batch kv_heads group query query_dim"]


@dataclass(frozen=True)
class Attention(Part):
    """The contract; fields are the YAML keys.

    A variant is frozen and knows no weights: it declares them, split into those that write and
    those that read, since a layer that reuses another's entries has none of the first kind.

    position: position encoding. heads: number of query heads.
    scale: factor of the logits; 1 / sqrt(query_dim) if None. softcap: bound of the logits (Gemma
    2), None for none. sinks: "learned" gives each head a logit of its own in the softmax's sum,
    which it may attend to instead of any entry (gpt-oss).
    """

    position: AnyPosition = dataclasses.field(default_factory=NoPE)
    heads: int = 4
    scale: float | None = None
    softcap: float | None = None
    sinks: Literal["learned"] | None = None

    sizes: ClassVar[tuple[str, ...]] = ("heads",)
    """Fields that are numbers of something."""
    grows: ClassVar[tuple[str, ...]] = ("heads",)
    """Fields that go with the width of the model."""
    values_apart: ClassVar[bool] = False
    """Whether values are kept in tensors of their own, which no key is made of."""

    def __post_init__(self) -> None:
        require_counts(self, *self.sizes, most=1 << 16)
        for name in ("scale", "softcap"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise BadInput(name, getattr(self, name), "greater than 0, or null")
        self.position.check(self.rotated_dim, self.heads)

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

    def write_params(self, d_model: int) -> dict[str, Param]:
        """Weights that turn a token into entries."""
        raise NotImplementedError

    def read_params(self, d_model: int) -> dict[str, Any]:
        """Weights that turn a token into a query, and what it read into the residual stream.

        A variant adds its own to these.
        """
        out = {"heads": self.heads, "value_dim": self.value_dim, "embed": d_model}
        fan_in = ("heads", "value_dim")
        declared: dict[str, Any] = {"output": Param(out, fan_in=fan_in, ends_branch=True)}
        if position := self.position.params(self.query_dim, self.heads):
            declared["position"] = position
        if self.sinks:
            declared["sinks"] = Param({"heads": self.heads}, role="vector", init="zeros")
        return declared

    def write(
        self, weights: Weights, x: Residual, position: Int[Array, "batch token"]
    ) -> dict[str, Float[Array, "batch _ token _"]]:
        """What each token leaves behind; never more than decoding must keep."""
        raise NotImplementedError

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        """What each token looks for."""
        raise NotImplementedError

    def address(self, weights: Weights, query: Queries) -> Query:
        """A query in the pieces that the recalled keys have."""
        return (query,)

    def recall(self, weights: Weights, entries: Entries) -> Recalled:
        """Keys and values of entries."""
        raise NotImplementedError

    def output(
        self, weights: Weights, out: Float[Array, "batch kv_heads group query width"]
    ) -> Residual:
        """What was read, as it enters the residual stream."""
        batch, kv_heads, group, length, width = out.shape
        heads = out.reshape(batch, kv_heads * group, length, width)
        return project(heads.swapaxes(1, 2), weights["output"], contracted=2)

    def memory(self) -> Hashable:
        """What must agree between a layer that writes and another that reads its entries."""
        raise NotImplementedError

    # What all have in common

    def read(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        mask: Mask,
        chunk: int | None = None,
    ) -> Residual:
        """What each query makes of the entries that it may see, in one softmax over all parts.

        parts: in the order of their positions. chunk: queries that the fused core takes at once,
        only where `mask` is aligned and there is one part; None for the plain core.
        """
        address, scores = self.asked(weights, self.query(weights, x, position), position)
        retrieved = [part.retrieve(address, partial(self.recall, weights)) for part in parts]
        if chunk:
            recalled, entries = retrieved[0]
            # Products in the type that those with weights have.
            operand = weights["output"].dtype
            address, recalled = jax.tree.map(
                lambda array: array.astype(operand), (address, recalled)
            )
            out = cores.fused(address, recalled, entries, scores, mask, chunk).astype(x.dtype)
        else:
            shown = [cores.Part.of(keys, part, position, mask) for keys, part in retrieved]
            out = cores.plain(address, shown, scores)
        return self.output(weights, out)

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

    def decoding(self) -> Attention:
        """The form that reads a cache."""
        return self

    @property
    def key_heads(self) -> int:
        """Heads that keys have, as queries see them."""
        return self.heads

    @property
    def stores(self) -> int:
        """Sets of entries that may differ: KV heads, where each has all its tensors to itself."""
        return 1

    def read_flops(self) -> int:
        """Floating-point operations of a forward pass in training, per query and visible entry."""
        return 2 * self.heads * (self.query_dim + self.value_dim)

    def written(
        self, d_model: int, batch: int, length: int, dtype: jnp.dtype
    ) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and types of the entries of `length` tokens, from `write` itself."""
        return jax.eval_shape(
            self.write,
            abstract(self.write_params(d_model), dtype),
            jax.ShapeDtypeStruct((batch, length, d_model), dtype),
            jax.ShapeDtypeStruct((batch, length), jnp.dtype("int32")),
        )

    def describe(self) -> str:
        """The fields on one line."""
        shown = [
            field.name if dataclasses.is_dataclass(value) else f"{field.name} {value}"
            for field in fields(self)
            if (value := getattr(self, field.name)) not in (None, ())
            and field.name not in ("kind", "position")
        ]
        return f"{getattr(self, 'kind', type(self).__name__)} ({', '.join(shown)})"


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


def by_group(query: Float[Array, "batch heads query query_dim"], kv_heads: int) -> Queries:
    """Query heads, those that share a KV head together."""
    batch, _, length, width = query.shape
    return query.reshape(batch, kv_heads, -1, length, width)
