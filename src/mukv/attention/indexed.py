"""Attention to chosen entries: the choice by an indexer, the read, and the indexer's loss.

A choice is the places of `top_k` entries for each query. It needs the scores of every query and
entry, so long rows are chosen for, and read, in chunks of queries, of which one is in memory at a
time. Such a chunk reads all entries under a mask, and of a window only those near the chunk; the
backward pass recomputes it. A decoding step gathers the chosen entries instead and reads no others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mukv.attention.base import Attention
from mukv.attention.cores import Part, Scores, mixed
from mukv.attention.cores.pairs import Division
from mukv.attention.entries import Bag, Entries
from mukv.attention.indexer import NONE, EntryChoice, Indexer, among, largest, scores
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
    """A bag as queries read it.

    recalled: keys and values; None where queries only choose
    scored_by: the indexer's keys; None where they are not needed
    entries: of the bag
    """

    recalled: Recalled | None
    scored_by: Recalled | None
    entries: Entries


class Queried(NamedTuple):
    """A chunk of queries.

    x: tokens that they are made from
    position, segment: of the tokens, as in `Mask`
    counted: which of them are not padding
    choice: what they read; None for all that they see
    """

    x: Residual
    position: Int[Array, "batch query"]
    segment: Int[Array, "batch query"] | None
    counted: Bool[Array, "batch query"]
    choice: EntryChoice | None


Ask = Callable[
    [Residual, Int[Array, "batch query"]],
    tuple[
        Float[Array, "batch index_heads query index_dim"], Float[Array, "batch index_heads query"]
    ],
]
"""Function that computes the indexer's queries of tokens at positions, and their weights."""


@dataclass(frozen=True)
class IndexedRead:
    """The read of one layer of which an indexer chooses the entries.

    weights: of the reading layer
    indexed: of each bag, whether entries are chosen among its own
    mask: of the layer; its `segment` is that of all queries
    indexer: of the layer; None if it reads what another layer chooses
    ask: computes the indexer's queries and their weights; None without an indexer
    """

    attention: Attention
    weights: Weights
    indexed: tuple[bool, ...]
    mask: Mask
    indexer: Indexer | None = None
    ask: Ask | None = None

    def choose(
        self,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        compute: Compute,
    ) -> EntryChoice | None:
        """Choose the entries that each token reads; None if it reads all that it sees."""
        assert self.indexer is not None
        number = self.indexer.top_k
        if number is None:
            return None
        queried, rows = self._queried(x, position), self._rows(x, parts, compute)
        if rows is None:
            bags = [self._scored(part, queried) for part in self._only_indexed(parts)]
        else:
            bags = [self._scored(part, None) for part in self._only_indexed(parts)]
        if sum(_size(bag) for bag in bags) <= number:
            return None
        # Only a ring that has wrapped holds entries in another order than that of their positions.
        place = None
        if not all(bag.entries.ordered for bag in bags):
            place = jnp.concatenate([bag.entries.position[:, 0] for bag in bags], axis=-1)

        def chosen(queried: Queried) -> EntryChoice:
            mask = replace(self.mask, segment=queried.segment, choice=None)
            seen = [mask.of(bag.entries).visible(queried.position, bag.entries) for bag in bags]
            visible = jnp.concatenate([each[:, 0] for each in seen], axis=-1)
            return largest(self._score(queried, bags), visible, number, place)

        if rows is None:
            return chosen(queried)
        padded = _padded_queries(rows, queried)
        found = jax.lax.map(lambda i: chosen(_some(rows, padded, i)), jnp.arange(rows.number))
        return jnp.moveaxis(found, 0, 1).reshape(len(x), -1, number)[:, : rows.length]

    def read(
        self,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        compute: Compute,
    ) -> tuple[Residual, Reported]:
        """Attend from each token to the entries of `mask.choice`; see `Attention.read`.

        Where tokens read their own entries, an indexer reports its loss as a penalty, and as
        `index_kl` the mean divergence in nats per token, beside `index_kl_uniform`, that of a
        uniform distribution.
        """
        queried, rows = self._queried(x, position), self._rows(x, parts, compute)
        if rows is None:
            out, sums = self._attend(queried, parts)
        else:
            out, sums = self._by_chunk(queried, parts, rows)
        y = self.attention.output(self.weights, out, x, position)
        return y, None if sums is None else self._reported(sums)

    def _queried(self, x: Residual, position: Int[Array, "batch token"]) -> Queried:
        segment = self.mask.segment
        counted = jnp.ones(position.shape, bool) if segment is None else segment > 0
        return Queried(x, position, segment, counted, self.mask.choice)

    def _rows(self, x: Residual, parts: Sequence[Bag], compute: Compute) -> Division | None:
        """Return the chunks of queries; None for all at once."""
        rows = Division.of(x.shape[1], compute.attention_chunk)
        whole = all(isinstance(part, Entries) for part in parts)
        at_once = rows.number == 1 or not whole or not compute.fused or capturing()
        return None if at_once else rows

    def _only_indexed(self, parts: Sequence[Bag]) -> list[Bag]:
        return [part for part, indexed in zip(parts, self.indexed, strict=True) if indexed]

    def _reported(self, sums: Float[Array, "batch 3"]) -> Reported:
        """Divide the sums over tokens by their number."""
        assert self.indexer is not None
        number = jnp.maximum(sums[:, 2], 1.0)
        own, uniform = sums[:, 0] / number, sums[:, 1] / number
        return {
            "penalty": self.indexer.loss * own,
            "index_kl": jax.lax.stop_gradient(own),
            "index_kl_uniform": uniform,
        }

    # Keys

    def _scored(self, part: Bag, queried: Queried | None) -> ReadBag:
        """Return the indexer's keys of a bag. queried: the queries, for a bag in which they differ
        in what they can read; None if there is none.
        """
        address: Query = ()
        if queried is not None and not isinstance(part, Entries):
            address = self._address(queried)[0]
        key, entries = part.retrieve(address, _index)
        return ReadBag(None, key, entries)

    def _held(self, part: Bag, address: Query, scored: bool) -> ReadBag:
        """Return the keys and values of a bag. scored: whether the indexer's keys are needed."""
        recalled, entries = part.retrieve(
            address, lambda entries: self.attention.recall(self.weights, entries)
        )
        return ReadBag(recalled, part.retrieve(address, _index)[0] if scored else None, entries)

    def _address(self, queried: Queried) -> tuple[Query, Scores]:
        query = self.attention.query(self.weights, queried.x, queried.position)
        return self.attention.scaled_queries(self.weights, query, queried.position)

    def _score(self, queried: Queried, bags: Sequence[ReadBag]) -> Float[Array, "batch query key"]:
        """Return the scores of all entries of the bags that have keys of the indexer."""
        assert self.ask is not None
        asking, weight = self.ask(queried.x, queried.position)
        keys = [bag.scored_by for bag in bags if bag.scored_by is not None]
        found = [scores(key.products((asking[:, None],)), weight) for key in keys]
        return jnp.concatenate(found, axis=-1)

    # Attention

    @property
    def _learns(self) -> bool:
        """Whether the indexer's loss is computed."""
        return self.mask.aligned and self.indexer is not None

    def _by_chunk(
        self, queried: Queried, parts: Sequence[Bag], rows: Division
    ) -> tuple[Array, Float[Array, "batch 3"] | None]:
        """Attend from one chunk of queries after the other."""
        padded = _padded_queries(rows, queried)
        near: list[tuple[ReadBag, int | None]] = []
        for part, indexed in zip(parts, self.indexed, strict=True):
            held = self._held(part, (), indexed and self._learns)
            window = self.mask.of(held.entries).window
            own = self.mask.aligned and held.entries.every == 1 and not indexed
            if not own or window is None or window + rows.size > rows.length:
                near.append((held, None))
            else:
                near.append((_padded(held, window - 1, rows.padding), window - 1))

        @jax.checkpoint
        def chunk(index: Array) -> tuple[Array, Array | None]:
            found = [
                held if before is None else _sliced(held, index * rows.size, before + rows.size)
                for held, before in near
            ]
            here = _some(rows, padded, index)
            return self._attend_held(here, self._address(here), found)

        out, sums = jax.lax.map(chunk, jnp.arange(rows.number))
        out = jnp.moveaxis(out, 0, 3)
        out = out.reshape(*out.shape[:3], -1, out.shape[-1])[:, :, :, : rows.length]
        return out, None if sums is None else jnp.sum(sums, axis=0)

    def _attend(
        self, queried: Queried, parts: Sequence[Bag]
    ) -> tuple[Array, Float[Array, "batch 3"] | None]:
        address = self._address(queried)
        bags = zip(parts, self.indexed, strict=True)
        held = [self._held(part, address[0], indexed and self._learns) for part, indexed in bags]
        one = queried.x.shape[1] == 1 and not self.mask.aligned and not capturing()
        if one and queried.choice is not None:
            return mixed(address[0], self._gathered(queried, parts, held), address[1])[0], None
        return self._attend_held(queried, address, held)

    def _gathered(
        self, queried: Queried, parts: Sequence[Bag], held: Sequence[ReadBag]
    ) -> list[Part]:
        """Return what one query per row reads: of a bag with more entries than a query reads, only
        the chosen entries, gathered.
        """
        assert queried.choice is not None
        start, found = 0, []
        for part, bag, indexed in zip(parts, held, self.indexed, strict=True):
            recalled, entries, chosen, size = bag.recalled, bag.entries, None, _size(bag)
            if indexed:
                place, start = queried.choice - start, start + size
                inside = (place >= 0) & (place < size) & (queried.choice >= 0)
                fewer = place.shape[-1] < size
                taken = part.taken(jnp.clip(place, 0, size - 1)) if fewer else None
                if taken is None:
                    chosen = among(jnp.where(inside, place, NONE), size)
                else:
                    recalled, entries, chosen = (
                        self.attention.recall(self.weights, taken),
                        taken,
                        inside,
                    )
            own = self.mask.of(entries)
            if chosen is not None:
                own = replace(own, chosen=chosen[:, None])
            assert recalled is not None
            found.append(Part(recalled, entries, own))
        return found

    def _attend_held(
        self, queried: Queried, address: tuple[Query, Scores], bags: Sequence[ReadBag]
    ) -> tuple[Array, Float[Array, "batch 3"] | None]:
        """Attend from these queries; return the outputs of the heads, and three sums over tokens:
        of the divergences of the indexer and of a uniform distribution, and of ones. None instead
        of the sums where the indexer does not learn.
        """
        mask = replace(self.mask, segment=queried.segment, choice=None)
        sizes = [_size(bag) for bag, indexed in zip(bags, self.indexed, strict=True) if indexed]
        chosen = None if queried.choice is None else among(queried.choice, sum(sizes))
        parts, start = [], 0
        for bag, indexed in zip(bags, self.indexed, strict=True):
            own = mask.of(bag.entries)
            if indexed and chosen is not None:
                stop = start + _size(bag)
                own, start = replace(own, chosen=chosen[:, None, :, start:stop]), stop
            assert bag.recalled is not None
            parts.append(Part(bag.recalled, bag.entries, own))
        out, weights = mixed(address[0], parts, address[1])
        return out, self._divergence(queried, bags, parts, weights) if self._learns else None

    def _divergence(
        self,
        queried: Queried,
        bags: Sequence[ReadBag],
        parts: Sequence[Part],
        weights: Float[Array, "batch kv_heads group query any_key"],
    ) -> Float[Array, "batch 3"]:
        """Return the sums of `_attend_held`.

        The attention's weights of the chosen entries are summed over heads and divided by their
        sum. They get no gradient.
        """
        pieces, seen, start = [], [], 0
        for part, indexed in zip(parts, self.indexed, strict=True):
            stop = start + part.entries.position.shape[-1]
            if indexed:
                pieces.append(weights[..., start:stop])
                seen.append(part.shown(queried.position).visible[:, 0])
            start = stop
        visible = jnp.concatenate(seen, axis=-1)
        read = jnp.sum(jax.lax.stop_gradient(jnp.concatenate(pieces, axis=-1)), axis=(1, 2))
        total = jnp.sum(read, axis=-1, keepdims=True)
        teacher = read / jnp.where(total > 0, total, 1.0)
        counted = queried.counted & (total[..., 0] > 0)
        score = self._score(queried, bags)
        student = jax.nn.log_softmax(jnp.where(visible, score, -1e30), axis=-1)
        known = teacher * jnp.log(jnp.where(teacher > 0, teacher, 1.0))
        own = jnp.sum(jnp.where(visible, known - teacher * student, 0.0), axis=-1)
        uniform = jnp.sum(known, axis=-1) + jnp.log(jnp.maximum(jnp.sum(visible, axis=-1), 1))
        tokens = jnp.stack([own, uniform, jnp.ones_like(own)], axis=-1)
        return jnp.sum(jnp.where(counted[..., None], tokens, 0.0), axis=1)


def _index(entries: Entries) -> Dense:
    """Return the indexer's keys of entries."""
    key = entries.tensors[INDEX]
    return Dense((key,), key)


def _size(bag: ReadBag) -> int:
    """Return the number of places of a bag."""
    return bag.entries.position.shape[-1]


def _padded_queries(rows: Division, queried: Queried) -> Queried:
    """Pad queries to a whole number of chunks."""
    return Queried(*(rows.padded(array, 1) for array in queried))


def _some(rows: Division, queried: Queried, index: Array) -> Queried:
    """Return one chunk of padded queries."""
    return Queried(*(rows.take(array, index, 1) for array in queried))


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
