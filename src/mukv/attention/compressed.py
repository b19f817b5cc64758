"""Compressed attention with a window (DeepSeek V4; transformers' `deepseek_v4`), and HCA.

Each token writes one normed, rotated vector, which is key and value of all heads; the newest
`window` of them are kept. In addition, every `every` tokens are compressed into one permanent
entry: a softmax-weighted mean per channel, normed and rotated. A query attends to both in one
softmax. Since values are rotated too, the output is rotated back by the query's position, so that
it depends on distances only.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import jax.numpy as jnp

from mukv.attention.base import Attention, Queries, by_group, by_token
from mukv.attention.compressor import ChunkPlaces, Running, compressed, gated_values
from mukv.attention.entries import Entries
from mukv.attention.mixer import Carried, EntryStore, StateStore
from mukv.attention.recalled import Dense
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project, project_groups
from mukv.core.norm import RMSNorm
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Residual, Weights

WINDOW, COMPRESSED, UNFINISHED = "window", "compressed", "unfinished"
"""Names of the stores: entries of the newest tokens; compressed entries; running sums of the
softmax of the compressed entry that is not yet complete.
"""


@dataclass(frozen=True)
class CompressedAttention(Attention):
    """Base class of attention to a window and to compressed entries (DeepSeek V4).

    A variant says how tokens are compressed.

    head_dim: width of a key, which is the value as well
    rope_dim: number of the last dimensions of a head, which are rotated
    query_rank: width of the normed latent from which queries are projected
    window: tokens whose own entries a query sees, itself included; None for all
    every: tokens per compressed entry; None for no compressed entries
    groups: number of groups of consecutive heads, each with an output projection of its own
    output_rank: width of the output projection of one group
    norm: normalisation of the latent, the entries and each query head
    """

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

    # Weights

    def write_params(self, d_model: int) -> dict[str, Any]:
        dims = {"embed": d_model, "head_dim": self.head_dim}
        return {
            "key": Param(dims, fan_in=("embed",), tag="key"),
            "norm": self.norm.params(self.head_dim, "head_dim"),
        }

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

    def near(
        self, weights: Weights, x: Residual, position: Int[Array, "batch token"]
    ) -> dict[str, Float[Array, "batch 1 token head_dim"]]:
        """Return the tensors of the entries that tokens have in the window."""
        key = self.norm.apply(weights["norm"], project(x, weights["key"]))
        return {"key": self.rotated(key, position)[:, None]}

    def rotated(
        self, x: Float[Array, "batch token head_dim"], position: Int[Array, "batch token"]
    ) -> Float[Array, "batch token head_dim"]:
        """Rotate the last `rope_dim` dimensions of vectors without a head axis."""
        return self.rotated_heads(x[:, None], position)[:, 0]

    def rotated_heads(
        self, x: Float[Array, "batch heads token head_dim"], position: Int[Array, "batch token"]
    ) -> Float[Array, "batch heads token head_dim"]:
        """Rotate the last `rope_dim` dimensions of each head."""
        unrotated, rotating = jnp.split(x, [x.shape[-1] - self.rope_dim], axis=-1)
        rotated = self.position.rotate(rotating, position[:, None])
        return jnp.concatenate([unrotated, rotated], axis=-1)

    # Reading

    def query(self, weights: Weights, x: Residual, position: Int[Array, "batch token"]) -> Queries:
        """Project queries from the normed latent; norm each head without a gain, then rotate.

        All heads are in the group of the single key.
        """
        latent = self.query_latent(weights, x)
        query = self.norm.unit(project(latent, weights["query"])).swapaxes(1, 2)
        return by_group(self.rotated_heads(query, position), 1)

    def query_latent(
        self, weights: Weights, x: Residual
    ) -> Float[Array, "batch token query_latent"]:
        """Return the normed latent from which queries are projected."""
        return self.norm.apply(weights["query_norm"], project(x, weights["query_latent"]))

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
        back = self.rotated_heads(out[:, 0], -position)[:, None]
        heads = self.gated(weights, by_token(back), x)
        groups = heads.reshape(*heads.shape[:2], self.groups, -1)
        low = project_groups(groups, weights["output_down"])
        return project(low.astype(x.dtype), weights["output_up"], contracted=2)

    def memory(self) -> Hashable:
        rotation = self.position.rotation()
        return self.kind, self.head_dim, self.rope_dim, self.window, self.every, rotation


@dataclass(frozen=True)
class HCA(CompressedAttention):
    """Heavily compressed attention of DeepSeek V4: a window, and one entry per `every` tokens."""

    kind: Literal["hca"] = "hca"

    def stores(self) -> Mapping[str, EntryStore | StateStore]:
        window = {WINDOW: EntryStore(window=self.window)}
        if self.every is None:
            return window
        running = StateStore(dict.fromkeys(Running._fields, (self.head_dim,)))
        return window | {COMPRESSED: EntryStore(self.every), UNFINISHED: running}

    def write_params(self, d_model: int) -> dict[str, Any]:
        declared = super().write_params(d_model)
        if self.every is None:
            return declared
        value = Param({"embed": d_model, "head_dim": self.head_dim}, fan_in=("embed",), tag="value")
        bias = {"every": self.every, "head_dim": self.head_dim}
        own = {
            "value": value,
            "gate": replace(value, tag="gate"),
            "bias": Param(bias, role="vector", init="zeros"),
            "norm": self.norm.params(self.head_dim, "head_dim"),
        }
        return declared | {"compressed": own}

    def write(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None = None,
    ) -> Any:
        window = self.near(weights, x, position)
        if self.every is None:
            return window
        own = weights["compressed"]
        value, logit = gated_values(own, x, position, self.every)
        chunks = ChunkPlaces.of(self.every, position, None if memory is None else memory.added)
        earlier = None if memory is None else Running(**memory.states[UNFINISHED])
        made = compressed(value, logit, chunks, self.every, earlier)
        entries = EntryStore(self.every).places(x.shape[1])
        mean = made.mean()[:, :entries].astype(x.dtype)
        entry = self.rotated(self.norm.apply(own["norm"], mean), chunks.first[:, :entries])
        return {
            WINDOW: window,
            COMPRESSED: {"key": entry[:, None]},
            UNFINISHED: {} if memory is None else made.newest(),
        }
