"""Attention to the entries that an indexer chooses, and the loss that trains the indexer.

The choice is a mask over all entries, so it needs the scores of every query and entry. Long rows
are therefore read in chunks of queries, of which one is in memory at a time; of a window only the
entries near the chunk are read. The backward pass recomputes each chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mukv.attention.base import Attention
from mukv.attention.cores import Part, mixed
from mukv.attention.cores.pairs import Division
from mukv.attention.entries import Bag, Entries
from mukv.attention.indexer import Indexer, largest, scores
from mukv.attention.mask import Mask
from mukv.attention.mixer import Reported
from mukv.attention.recalled import Dense, Query, Recalled
from mukv.core.compute import Compute
from mukv.core.tap import capturing
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights

INDEX = "index"
"""Name of the indexer's key among the tensors of an entry."""
REASON = "each query chooses its entries, for a chunk of queries at a time"
"""Why no core that hides the logits can serve."""


class ReadBag(NamedTuple):
    """A bag as queries read it: keys and values, the indexer's keys (None where all entries are
    read), and the entries.
    """

    recalled: Recalled
    scored_by: Recalled | None
    entries: Entries


class Queried(NamedTuple):
    """A chunk of queries: the tokens they are made from, their positions and documents, and which
    of them are not padding.
    """

    x: Residual
    position: Int[Array, "batch query"]
    segment: Int[Array, "batch query"] | None
    counted: Bool[Array, "batch query"]


Ask = Callable[
    [Residual, Int[Array, "batch query"]],
    tuple[
        Float[Array, "batch index_heads query index_dim"], Float[Array, "batch index_heads query"]
    ],
]
"""Function that computes the indexer's queries of tokens at positions, and their weights."""


@dataclass(frozen=True)
class IndexedRead:
    """The read of one layer in which an indexer chooses entries.

    weights: of the reading layer
    ask: computes the indexer's queries and their weights
    indexed: of each bag, whether the indexer chooses among its entries
    mask: of the layer; its `segment` is that of all queries
    """

    attention: Attention
    indexer: Indexer
    weights: Weights
    ask: Ask
    indexed: tuple[bool, ...]
    mask: Mask

    def read(
        self,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        compute: Compute,
    ) -> tuple[Residual, Reported]:
        """Attend from each token to the entries that it chooses; see `Attention.read`.

        Where tokens read their own entries, it reports the indexer's loss as a penalty, and as
        `index_kl` the mean divergence in nats per token, beside `index_kl_uniform`, that of a
        uniform distribution.
        """
        segment = self.mask.segment
        counted = jnp.ones(position.shape, bool) if segment is None else segment > 0
        queried = Queried(x, position, segment, counted)
        rows = Division.of(x.shape[1], compute.attention_chunk)
        whole = all(isinstance(part, Entries) for part in parts)
        if rows.number == 1 or not whole or not compute.fused or capturing():
            out, sums = self._attend(queried, parts)
        else:
            out, sums = self._by_chunk(queried, parts, rows)
        y = self.attention.output(self.weights, out, x, position)
        return y, self._reported(sums) if self.mask.aligned else None

    def _reported(self, sums: Float[Array, "batch 3"]) -> Reported:
        """Divide the sums over tokens by their number."""
        number = jnp.maximum(sums[:, 2], 1.0)
        own, uniform = sums[:, 0] / number, sums[:, 1] / number
        return {
            "penalty": self.indexer.loss * own,
            "index_kl": jax.lax.stop_gradient(own),
            "index_kl_uniform": uniform,
        }

    def _by_chunk(
        self, queried: Queried, parts: Sequence[Bag], rows: Division
    ) -> tuple[Array, Float[Array, "batch 3"]]:
        """Attend from one chunk of queries after the other."""
        padded = Queried(*(rows.padded(array, 1) for array in queried))
        near: list[tuple[ReadBag, int | None]] = []
        for part, indexed in zip(parts, self.indexed, strict=True):
            held = self._held(part, (), indexed)
            window = self.mask.of(held.entries).window
            own = self.mask.aligned and held.entries.every == 1
            if not own or window is None or window + rows.size > rows.length:
                near.append((held, None))
            else:
                near.append((_padded(held, window - 1, rows.padding), window - 1))

        @jax.checkpoint
        def chunk(index: Array) -> tuple[Array, Array]:
            here = Queried(*(rows.take(array, index, 1) for array in padded))
            found = [
                held if before is None else _sliced(held, index * rows.size, before + rows.size)
                for held, before in near
            ]
            return self._attend_held(here, lambda _: found)

        out, sums = jax.lax.map(chunk, jnp.arange(rows.number))
        out = jnp.moveaxis(out, 0, 3)
        out = out.reshape(*out.shape[:3], -1, out.shape[-1])[:, :, :, : rows.length]
        return out, jnp.sum(sums, axis=0)

    def _held(self, part: Bag, address: Query, indexed: bool) -> ReadBag:
        """Compute what a query reads of a bag."""

        def index(entries: Entries) -> Recalled:
            key = entries.tensors[INDEX]
            return Dense((key,), key)

        recalled, entries = part.retrieve(
            address, lambda entries: self.attention.recall(self.weights, entries)
        )
        return ReadBag(recalled, part.retrieve(address, index)[0] if indexed else None, entries)

    def _attend(
        self, queried: Queried, parts: Sequence[Bag]
    ) -> tuple[Array, Float[Array, "batch 3"]]:
        def held(address: Query) -> list[ReadBag]:
            bags = zip(parts, self.indexed, strict=True)
            return [self._held(part, address, indexed) for part, indexed in bags]

        return self._attend_held(queried, held)

    def _attend_held(
        self, queried: Queried, held: Callable[[Query], list[ReadBag]]
    ) -> tuple[Array, Float[Array, "batch 3"]]:
        """Attend from these queries; return the outputs of the heads, and three sums over tokens:
        of the divergences of the indexer and of a uniform distribution, and of ones.
        """
        position, attention = queried.position, self.attention
        query = attention.query(self.weights, queried.x, position)
        address, scored = attention.scaled_queries(self.weights, query, position)
        bags = held(address)
        mask = replace(self.mask, segment=queried.segment)
        masks = [mask.of(bag.entries) for bag in bags]
        score, seen = self._choice(queried, bags, masks)
        parts, start = [], 0
        for bag, own in zip(bags, masks, strict=True):
            if bag.scored_by is not None:
                stop = start + bag.entries.position.shape[-1]
                own, start = replace(own, chosen=seen[:, None, :, start:stop]), stop
            parts.append(Part(bag.recalled, bag.entries, own))
        out, weights = mixed(address, parts, scored)
        return out, self._divergence(queried, bags, score, seen, weights)

    def _choice(
        self, queried: Queried, bags: Sequence[ReadBag], masks: Sequence[Mask]
    ) -> tuple[Float[Array, "batch query key"], Bool[Array, "batch query key"]]:
        """Return the scores of all entries that the indexer chooses among, in the order of the
        bags, and which are chosen.
        """
        asking, weight = self.ask(queried.x, queried.position)
        found, seen, place = [], [], []
        for bag, mask in zip(bags, masks, strict=True):
            if bag.scored_by is not None:
                found.append(scores(bag.scored_by.products((asking[:, None],)), weight))
                seen.append(mask.visible(queried.position, bag.entries)[:, 0])
                place.append(bag.entries.position[:, 0])
        score, visible = jnp.concatenate(found, axis=-1), jnp.concatenate(seen, axis=-1)
        if self.indexer.top_k is None:
            return score, visible
        # Only a ring that has wrapped holds entries in another order than that of their positions.
        ordered = all(bag.entries.ordered for bag in bags if bag.scored_by is not None)
        position = None if ordered else jnp.concatenate(place, axis=-1)
        return score, largest(score, visible, self.indexer.top_k, position)

    def _divergence(
        self,
        queried: Queried,
        bags: Sequence[ReadBag],
        score: Float[Array, "batch query key"],
        seen: Bool[Array, "batch query key"],
        weights: Float[Array, "batch kv_heads group query any_key"],
    ) -> Float[Array, "batch 3"]:
        """Return the sums of `_attend_held`.

        The attention's weights of the chosen entries are summed over heads and divided by their
        sum. They get no gradient.
        """
        pieces, start = [], 0
        for bag in bags:
            stop = start + bag.entries.position.shape[-1]
            if bag.scored_by is not None:
                pieces.append(weights[..., start:stop])
            start = stop
        read = jnp.sum(jax.lax.stop_gradient(jnp.concatenate(pieces, axis=-1)), axis=(1, 2))
        total = jnp.sum(read, axis=-1, keepdims=True)
        teacher = read / jnp.where(total > 0, total, 1.0)
        counted = queried.counted & (total[..., 0] > 0)
        student = jax.nn.log_softmax(jnp.where(seen, score, -1e30), axis=-1)
        known = teacher * jnp.log(jnp.where(teacher > 0, teacher, 1.0))
        own = jnp.sum(jnp.where(seen, known - teacher * student, 0.0), axis=-1)
        uniform = jnp.sum(known, axis=-1) + jnp.log(jnp.maximum(jnp.sum(seen, axis=-1), 1))
        tokens = jnp.stack([own, uniform, jnp.ones_like(own)], axis=-1)
        return jnp.sum(jnp.where(counted[..., None], tokens, 0.0), axis=1)


def _padded(held: ReadBag, before: int, after: int) -> ReadBag:
    """Pad the entries of a bag with invalid ones in front and behind."""
    entries = held.entries
    if entries.valid is None:
        entries = replace(entries, valid=jnp.ones(entries.position.shape, bool))

    def pad(array: Array) -> Array:
        ends = [(before, after, 0) if axis == 2 else (0, 0, 0) for axis in range(array.ndim)]
        return jax.lax.pad(array, jnp.zeros((), array.dtype), ends)

    return jax.tree.map(pad, held._replace(entries=entries))


def _sliced(held: ReadBag, start: Array, size: int) -> ReadBag:
    """Return `size` entries of a bag, from `start` on."""

    def cut(array: Array) -> Array:
        return jax.lax.dynamic_slice_in_dim(array, start, size, axis=2)

    return jax.tree.map(cut, held)
