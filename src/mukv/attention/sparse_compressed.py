"""Compressed sparse attention (CSA, DeepSeek V4; transformers' `deepseek_v4`).

As HCA it attends to a window and to compressed entries. These are closer together and overlap: an
entry covers the tokens of its own chunk and of the chunk before. Each query reads only the `top_k`
that an indexer chooses; the indexer has compressed keys of its own.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import jax

from mukv.attention.compressed import COMPRESSED, UNFINISHED, WINDOW, CompressedAttention
from mukv.attention.compressor import ChunkPlaces, Running, gated_values, overlapping
from mukv.attention.entries import Bag
from mukv.attention.indexed import INDEX, IndexedRead
from mukv.attention.indexed_attention import IndexedAttention
from mukv.attention.indexer import Indexer
from mukv.attention.mask import Mask
from mukv.attention.mixer import Carried, EntryStore, StateStore, Tensors
from mukv.core.errors import BadInput
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Residual, Weights

FOLLOWING = "following"
"""Store of the running softmax of the unfinished chunk's first series, for the entry after it."""
INDEX_UNFINISHED, INDEX_FOLLOWING = "index_unfinished", "index_following"
"""The same two stores of the indexer's keys."""


@dataclass(frozen=True)
class CSA(CompressedAttention, IndexedAttention):
    """CSA of DeepSeek V4: a window, and the `top_k` best of overlapping compressed entries.

    every: distance of neighbouring compressed entries in tokens; each covers twice as many
    indexer: what chooses the compressed entries that a query reads
    """

    kind: Literal["csa"] = "csa"
    every: int = 4  # pyright: ignore[reportIncompatibleVariableOverride]
    indexer: Indexer = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default_factory=Indexer
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.indexer.width < self.rope_dim:
            allowed = f"at least rope_dim ({self.rope_dim}), which is rotated"
            raise BadInput("indexer.width", self.indexer.width, allowed)

    def stores(self) -> Mapping[str, EntryStore | StateStore]:
        def running(width: int) -> StateStore:
            return StateStore(dict.fromkeys(Running._fields, (width,)))

        return {
            WINDOW: EntryStore(window=self.window),
            COMPRESSED: EntryStore(self.every),
            UNFINISHED: running(self.head_dim),
            FOLLOWING: running(self.head_dim),
            INDEX_UNFINISHED: running(self.indexer.width),
            INDEX_FOLLOWING: running(self.indexer.width),
        }

    # Weights

    def write_params(self, d_model: int) -> dict[str, Any]:
        index = self._compressor(d_model, "index_dim", self.indexer.width)
        # Adapters and analyses take the tags for the keys and values of attention.
        bare = {name: replace(index[name], tag=None) for name in ("value", "gate")}
        return {
            **super().write_params(d_model),
            "compressed": self._compressor(d_model, "head_dim", self.head_dim),
            "index": index | bare,
        }

    def _compressor(self, d_model: int, axis: str, width: int) -> dict[str, Any]:
        """Declare the weights of a compressor. axis, width: last dimension of the entries."""
        series = {"series": 2, axis: width}
        value = Param({"embed": d_model, **series}, fan_in=("embed",), tag="value")
        return {
            "value": value,
            "gate": replace(value, tag="gate"),
            "bias": Param({"every": self.every, **series}, role="vector", init="zeros"),
            "norm": self.norm.params(width, axis),
        }

    def read_params(self, d_model: int) -> dict[str, Any]:
        index = self.indexer.params(d_model, self.query_rank)
        return {**super().read_params(d_model), "index": index}

    # Writing

    def write(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None = None,
    ) -> Any:
        chunks = ChunkPlaces.of(self.every, position, None if memory is None else memory.added)
        entry = weights["compressed"], x, (UNFINISHED, FOLLOWING)
        index = weights["index"], jax.lax.stop_gradient(x), (INDEX_UNFINISHED, INDEX_FOLLOWING)
        key, states = self._compress(*entry, position, chunks, memory)
        index_key, more = self._compress(*index, position, chunks, memory)
        compressed = {"key": key, INDEX: index_key}
        window = self.near(weights, x, position)
        return {WINDOW: window, COMPRESSED: compressed, **states, **more}

    def _compress(
        self,
        weights: Weights,
        x: Residual,
        names: tuple[str, str],
        position: Int[Array, "batch token"],
        chunks: ChunkPlaces,
        memory: Carried | None,
    ) -> tuple[Float[Array, "batch 1 entry width"], dict[str, Tensors]]:
        """Return the entries that these tokens complete, and the states by store.

        names: stores of the running softmax of the unfinished entry, and of the one after it
        """
        value, logit = gated_values(weights, x, position, self.every)
        earlier = None
        if memory is not None:
            now, following = (Running(**memory.states[name]) for name in names)
            earlier = now, following
        made = overlapping(value, logit, chunks, self.every, earlier)
        entries = EntryStore(self.every).places(x.shape[1])
        mean = made[0].mean()[:, :entries].astype(x.dtype)
        entry = self.rotated(self.norm.apply(weights["norm"], mean), chunks.first[:, :entries])
        states: dict[str, Tensors] = {name: {} for name in names}
        if memory is not None:
            states = {name: sums.newest() for name, sums in zip(names, made, strict=True)}
        return entry[:, None], states

    # Reading

    def indexed(self, weights: Weights, parts: Sequence[Bag], mask: Mask) -> IndexedRead:
        """Return the read of a window and of compressed entries, among which the indexer chooses.

        The bags of the window come first, then as many of the compressed entries.
        """

        def ask(x: Residual, position: Int[Array, "batch query"]) -> tuple[Array, Array]:
            own, x = weights["index"], jax.lax.stop_gradient(x)
            latent = jax.lax.stop_gradient(self.query_latent(weights, x))
            query = self.rotated_heads(self.indexer.queries(own, latent), position)
            return query, self.indexer.weight(own, x)

        indexed = tuple(2 * place >= len(parts) for place in range(len(parts)))
        return IndexedRead(self, weights, indexed, mask, self.indexer, ask)

    def memory(self) -> Hashable:
        return super().memory(), self.indexer.width

    def pair_flops(
        self, bags: Mapping[str, EntryStore], tokens: int, most: int | None = None
    ) -> float:
        """Count the entries that are read, and the scores of all compressed ones."""
        window, entries = bags[WINDOW], bags[COMPRESSED]
        read = window.mean_visible(tokens) + entries.mean_visible(tokens, self.indexer.top_k)
        return self.read_flops() * read + self.indexer.flops() * entries.mean_visible(tokens)
