"""Heavily compressed attention (HCA, DeepSeek V4; transformers' `deepseek_v4`).

Each token writes one normed, rotated vector, which is key and value of all heads; the newest
`window` of them are kept. In addition, every `every` tokens are compressed into one permanent
entry: a softmax-weighted mean per channel, normed and rotated. A query attends to both in one
softmax. Since values are rotated too, the output is rotated back by the query's position, so that
it depends on distances only.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mukv.attention.base import Attention, Queries, by_group, by_token
from mukv.attention.entries import Entries
from mukv.attention.mixer import Carried, EntryStore, StateStore, Tensors
from mukv.attention.recalled import Dense
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.norm import RMSNorm
from mukv.core.params import Param, Tag
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights

WINDOW, COMPRESSED, UNFINISHED = "window", "compressed", "unfinished"
"""Names of the stores: entries of the newest tokens; compressed entries; running sums of the
softmax of the compressed entry that is not yet complete.
"""


@dataclass(frozen=True)
class HCA(Attention):
    """HCA of DeepSeek V4, which is compressed attention with a window.

    head_dim: width of a key, which is the value as well
    rope_dim: number of the last dimensions of a head, which are rotated
    query_rank: width of the normed latent from which queries are projected
    window: tokens whose own entries a query sees, itself included; None for all
    every: tokens per compressed entry; None for no compressed entries
    groups: number of groups of consecutive heads, each with an output projection of its own
    output_rank: width of the output projection of one group
    norm: normalisation of the latent, the entries and each query head
    """

    kind: Literal["hca"] = "hca"
    head_dim: int = 32
    rope_dim: int = 16
    query_rank: int = 64
    window: int | None = 128
    every: int | None = 128
    groups: int = 1
    output_rank: int = 64
    norm: RMSNorm = field(default_factory=RMSNorm)

    sizes: ClassVar[tuple[str, ...]] = (
        *("heads", "head_dim", "rope_dim", "query_rank", "groups", "output_rank"),
    )
    grows: ClassVar[tuple[str, ...]] = ("heads", "query_rank", "groups")

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "window", "every", unit="token")
        if self.rope_dim > self.head_dim:
            raise BadInput("rope_dim", self.rope_dim, f"at most head_dim ({self.head_dim})")
        if self.heads % self.groups:
            raise BadInput("groups", self.groups, f"a number that divides heads ({self.heads})")

    @property
    def query_dim(self) -> int:
        return self.head_dim

    @property
    def rotated_dim(self) -> int:
        return self.rope_dim

    @property
    def key_heads(self) -> int:
        return 1

    def stores(self) -> Mapping[str, EntryStore | StateStore]:
        window = {WINDOW: EntryStore(window=self.window)}
        if self.every is None:
            return window
        running = dict.fromkeys(Running._fields, (self.head_dim,))
        return window | {COMPRESSED: EntryStore(self.every), UNFINISHED: StateStore(running)}

    # Weights

    def write_params(self, d_model: int) -> dict[str, Any]:
        def vector(tag: Tag) -> Param:
            dims = {"embed": d_model, "head_dim": self.head_dim}
            return Param(dims, fan_in=("embed",), tag=tag)

        declared = {"key": vector("key"), "norm": self.norm.params(self.head_dim, "head_dim")}
        if self.every is not None:
            bias = {"every": self.every, "head_dim": self.head_dim}
            declared["compressed"] = {
                "value": vector("value"),
                "gate": vector("gate"),
                "bias": Param(bias, role="vector", init="zeros"),
                "norm": self.norm.params(self.head_dim, "head_dim"),
            }
        return declared

    def read_params(self, d_model: int) -> dict[str, Any]:
        latent = {"query_latent": self.query_rank}
        query = latent | {"heads": self.heads, "head_dim": self.head_dim}
        return {
            **super().read_params(d_model),
            "query_latent": Param({"embed": d_model, **latent}, fan_in=("embed",)),
            "query_norm": self.norm.params(self.query_rank, "query_latent"),
            "query": Param(query, fan_in=tuple(latent), tag="query"),
        }

    def output_params(self, d_model: int) -> dict[str, Any]:
        group = {"groups": self.groups}
        heads = {"group_heads": self.heads // self.groups, "head_dim": self.head_dim}
        rank = {"output_rank": self.output_rank}
        up = Param(group | rank | {"embed": d_model}, fan_in=(*group, *rank), ends_branch=True)
        down = Param(group | heads | rank, fan_in=tuple(heads), batch=tuple(group))
        return {"output_down": down, "output_up": up}

    # Writing

    def write(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None = None,
    ) -> Any:
        key = self.norm.apply(weights["norm"], project(x, weights["key"]))
        window = {"key": self._rotated(key, position)[:, None]}
        if self.every is None:
            return window
        own = weights["compressed"]
        entry, state = self._compress(own, x, position, memory)
        return {WINDOW: window, COMPRESSED: {"key": entry[:, None]}, UNFINISHED: state}

    def _compress(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None,
    ) -> tuple[Float[Array, "batch entry head_dim"], Tensors]:
        """Compress every `every` tokens of a document into one entry.

        Returns the entries that these tokens complete, and the running softmax of the incomplete
        one (empty in training, where `memory` is None).
        """
        every = self.every
        assert every is not None
        value = project(x, weights["value"], out=jnp.dtype("float32"))
        logit = project(x, weights["gate"], out=jnp.dtype("float32"))
        logit = logit + jnp.take(weights["bias"].astype(jnp.float32), position % every, axis=0)
        last, _ = EntryStore(every).closing(position)
        length = jnp.full_like(last, every)
        if memory is not None:
            # One more entry, of the tokens after the last complete one: the state to continue from.
            added = memory.added[:, None]
            last = jnp.concatenate([last, added - 1], axis=1)
            length = jnp.concatenate([length, (position[:, :1] + added) % every], axis=1)
        made = running(value, logit, last, length, min(every, x.shape[1]))
        state: Tensors = {}
        if memory is not None:
            earlier = Running(**memory.states[UNFINISHED])
            made = made.after(earlier, length > last + 1)
            state = {name: array[:, -1] for name, array in made._asdict().items()}
            made = Running(*(array[:, :-1] for array in made))
        mean = made.weighted / jnp.where(made.total > 0, made.total, 1.0)
        entry = self.norm.apply(weights["norm"], mean.astype(x.dtype))
        last = last[:, : entry.shape[1]]
        # Rotated by the position of its first token, but visible from its last token on.
        first = jnp.take_along_axis(position, last, axis=1) - every + 1
        return self._rotated(entry, first), state

    def _rotated(
        self, x: Float[Array, "batch token head_dim"], position: Int[Array, "batch token"]
    ) -> Float[Array, "batch token head_dim"]:
        """Rotate the last `rope_dim` dimensions of vectors without a head axis."""
        return self._rotated_heads(x[:, None], position)[:, 0]

    def _rotated_heads(
        self, x: Float[Array, "batch heads token head_dim"], position: Int[Array, "batch token"]
    ) -> Float[Array, "batch heads token head_dim"]:
        """Rotate the last `rope_dim` dimensions of each head."""
        unrotated, rotating = jnp.split(x, [self.head_dim - self.rope_dim], axis=-1)
        rotated = self.position.rotate(rotating, position[:, None])
        return jnp.concatenate([unrotated, rotated], axis=-1)

    # Reading

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        """Project queries from the normed latent; norm each head without a gain, then rotate.

        All heads are in the group of the single key.
        """
        latent = self.norm.apply(weights["query_norm"], project(x, weights["query_latent"]))
        query = self.norm.unit(project(latent, weights["query"])).swapaxes(1, 2)
        return by_group(self._rotated_heads(query, position), 1)

    def recall(self, weights: Weights, entries: Entries) -> Dense:
        key = entries.tensors["key"]
        return Dense((key,), key)

    def output(
        self,
        weights: Weights,
        out: Float[Array, "batch 1 heads query head_dim"],
        x: Residual,
        position: Int[Array, "batch query"],
    ) -> Residual:
        """Rotate the outputs back, project each head group to `output_rank`, then all to the
        stream.
        """
        back = self._rotated_heads(out[:, 0], -position)[:, None]
        heads = self.gated(weights, by_token(back), x)
        groups = heads.reshape(*heads.shape[:2], self.groups, -1, self.head_dim)
        down = weights["output_down"]
        low = jnp.einsum(
            "btghd,ghdr->btgr", groups.astype(down.dtype), down, preferred_element_type=jnp.float32
        )
        return project(low.astype(x.dtype), weights["output_up"], contracted=2)

    def memory(self) -> Hashable:
        rotation = self.position.rotation()
        return self.kind, self.head_dim, self.rope_dim, self.window, self.every, rotation


class Running(NamedTuple):
    """Running sums of a softmax over tokens, per channel, to which later tokens can be added.

    top: largest logit
    total: sum of exp(logit - top)
    weighted: sum of exp(logit - top) times the values

    All are zero before the first token.
    """

    top: Float[Array, "*place head_dim"]
    total: Float[Array, "*place head_dim"]
    weighted: Float[Array, "*place head_dim"]

    def after(self, earlier: Running, which: Bool[Array, "batch place"]) -> Running:
        """Add the sums of earlier tokens to the sums at some places.

        earlier: one set of sums per row, without the axis of places
        which: places that the earlier tokens belong to
        """
        begun = which[..., None] & (earlier.total > 0)[:, None]
        old = jnp.where(begun, earlier.top[:, None], -jnp.inf)
        new = jnp.where(self.total > 0, self.top, -jnp.inf)
        top = _finite(jnp.maximum(old, new))
        old, new = jnp.exp(old - top), jnp.exp(new - top)
        return Running(
            top,
            old * earlier.total[:, None] + new * self.total,
            old * earlier.weighted[:, None] + new * self.weighted,
        )


def running(
    value: Float[Array, "batch token head_dim"],
    logit: Float[Array, "batch token head_dim"],
    last: Int[Array, "batch place"],
    length: Int[Array, "batch place"],
    most: int,
) -> Running:
    """Compute the running softmax sums over the `length` tokens up to index `last`.

    Tokens before the start of the row are left out. most: upper bound of `length`. The tokens are
    gathered and not scattered, so that the gradient is deterministic.
    """
    back = jnp.arange(most)[None, None]
    token = last[..., None] - back
    valid = (token >= 0) & (back < length[..., None])
    index = jnp.maximum(token, 0).reshape(len(last), -1, 1)

    def gathered(array: Array) -> Array:
        found = jnp.take_along_axis(array, index, axis=1)
        return found.reshape(*token.shape, array.shape[-1])

    masked = jnp.where(valid[..., None], gathered(logit), -jnp.inf)
    top = _finite(jax.lax.stop_gradient(jnp.max(masked, axis=2)))
    weight = jnp.exp(masked - top[:, :, None])
    return Running(top, jnp.sum(weight, axis=2), jnp.sum(weight * gathered(value), axis=2))


def _finite(top: Array) -> Array:
    """Replace -inf, the maximum of an empty set of logits, by 0."""
    return jnp.where(jnp.isfinite(top), top, 0.0)
