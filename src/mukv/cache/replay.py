"""Eviction by replaying the prompt (KVzip): keep what the model reads while it repeats the text.

The prompt is first read whole. Then its chunks are read again after it, each behind an instruction
to repeat it, and each entry is scored by the largest attention weight that it gets (Kim et al.
2025). `mukv.infer.replay` runs these passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, no_type_check

import jax
import jax.numpy as jnp

from mukv.attention import Entries
from mukv.cache.base import AllRead, Reader, Ring, SlotArrays
from mukv.cache.critical import projected_by_head
from mukv.cache.keep import Sinking
from mukv.cache.layers import Layers
from mukv.cache.seen import Score, Seen
from mukv.cache.spread import Spread
from mukv.cache.when import Hold, When
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float, Int

TWICE = (
    "`mukv generate`, `mukv bench` and `mukv compress`, which read a prompt twice, for a model of "
    "one stack"
)
"""Commands that make scores from a second reading."""
LEAST = 1e-6
"""Least norm of an input that weights are divided by."""
QUERIES = 128
"""Queries whose attention weights are in memory at once."""


@dataclass(frozen=True)
class KVzip(Sinking):
    """Score: largest attention weight that an entry gets, over the heads of its group, while the
    prompt is repeated chunk by chunk behind it (KVzip, Kim et al. 2025).

    The weights are softmax over the chunk, the first tokens and the repetition. The budget is that
    of all layers and heads together, and what follows the prompt is kept.

    chunk: tokens that are repeated at once
    sinks: number of first tokens, which are always kept
    plus: whether a weight is multiplied with |W v_j| / |h_t| before the largest is taken, where W
        is the head's output projection and h_t the layer's input at the repeating token (KVzip+)
    """

    spread: Spread = field(default_factory=Layers)
    when: When = field(default_factory=Hold)
    chunk: int = 2048
    plus: bool = False
    asks: tuple[tuple[int, ...], ...] = ()
    """Token ids in front of the first chunk, of others with the last tokens of the chunk before in
    between, and of what follows both; empty for none."""

    needs_queries: ClassVar[bool] = True
    replays: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "chunk", most=1 << 20)

    @property
    def scoring(self) -> tuple[Any, ...]:
        """Fields on which scores depend: policies with equal ones can share a second reading."""
        return self.chunk, self.sinks, self.plus, self.asks

    def score(self, seen: Seen) -> tuple[Score, Mapping[str, Array]]:
        if seen.reader.scores is None:
            raise BadInput("policy", "kvzip", TWICE)
        # Heads that share a store have their entries one after the other.
        score = seen.reader.scores
        return jnp.tile(score, (1, 1, seen.valid.shape[-1] // score.shape[-1])), {}


# JAX also builds pytrees whose leaves are not arrays, so that shapes can't be checked here.
@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Replaying(AllRead):
    """A body that scores its entries by the new queries, and adds no entry.

    body: the entries of the prompt
    score: of the entries of one chunk, float32
    start: index of its first entry
    chunk: its number of entries
    sinks: first entries that take part in the softmax, if they are in front of the chunk
    plus: whether weights are multiplied with norms of projected values and inputs
    """

    body: Ring
    score: Float[Array, "batch kv_heads entry"]
    start: Int[Array, ""]
    chunk: int = field(metadata={"static": True})
    sinks: int = field(metadata={"static": True})
    plus: bool = field(default=False, metadata={"static": True})

    @property
    def needs_queries(self) -> bool:
        return True

    def entries(self, length: Int[Array, " batch"]) -> Entries:
        return self.body.entries(length)

    def extended(
        self,
        new: SlotArrays,
        length: Int[Array, " batch"],
        added: Int[Array, " batch"],
        reader: Reader,
        fresh: bool = False,
    ) -> Replaying:
        first, chunk = jnp.arange(self.sinks), self.start + jnp.arange(self.chunk)
        index = jnp.concatenate([first, chunk])
        there = jnp.concatenate([first < self.start, jnp.ones(self.chunk, bool)])
        there = there[None] & (index[None] < length[:, None])
        own = jnp.arange(next(iter(new.values())).shape[2])[None]
        place = jnp.broadcast_to(index[None], there.shape)
        place = jnp.concatenate([place, length[:, None] + own], axis=1)
        there = jnp.concatenate([there, own < added[:, None]], axis=1)

        def taken(name: str) -> Array:
            old = jnp.take(self.body.tensors[name], index, axis=2, mode="clip")
            return jnp.concatenate([old, new[name].astype(old.dtype)], axis=2)

        tensors = {name: taken(name) for name in self.body.tensors}
        entries = Entries(tensors, place[:, None], there[:, None])
        seen = Seen(reader, entries, length, added, added, None, {})
        queries = seen.queries.shape[3]
        size = min(QUERIES, queries)

        scored = slice(self.sinks, self.sinks + self.chunk)
        norm = projected_by_head(seen, order=2)[..., scored] if self.plus else None

        def most(best: Array, start: Array) -> tuple[Array, None]:
            asked = jnp.broadcast_to(start + jnp.arange(size)[None], (len(added), size))
            weights = seen.weights(asked)[..., scored]
            if norm is not None and reader.inputs is not None:
                place = jnp.clip(asked, 0, queries - 1)[..., None]
                inputs = jnp.take_along_axis(reader.inputs.astype(jnp.float32), place, axis=1)
                size_of = jnp.maximum(jnp.linalg.norm(inputs, axis=-1), LEAST)
                weights *= norm[:, :, :, None] / size_of[:, None, None, :, None]
            return jnp.maximum(best, jnp.max(weights, axis=(2, 3))), None

        best, _ = jax.lax.scan(most, self.score, jnp.arange(0, queries, size))
        return replace(self, score=best)
