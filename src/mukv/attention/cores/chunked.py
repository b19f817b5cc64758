"""Attention by blocks of queries and keys, with an online softmax (Dao et al. 2022).

No token x token tensor exists, forward or backward. A loop goes through the pairs (chunk of
queries, block of keys) in which some query may see some key, and holds the logits of one pair.
The forward pass keeps the result and the logarithm of each softmax's sum; the backward pass
computes the weights of each pair again from these. All bags of entries share one softmax: the
running (maximum, sum, mixture) of each query goes on from bag to bag.

The number of operations in the program does not depend on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mukv.attention.cores.base import Core, Demand, Out, Part, Scores, Shown, finite
from mukv.attention.cores.pairs import Cut, Places, aligned_pairs, pairs
from mukv.attention.entries import Entries
from mukv.attention.mask import Mask
from mukv.attention.recalled import Query
from mukv.core.broadcast import with_rank
from mukv.core.compute import Compute
from mukv.core.typing import Array
from mukv.position import AnyPosition


@dataclass(frozen=True)
class Chunked(Core):
    """chunk: queries and keys that are taken at once; None for `chunk_size`. operands: type that
    queries, keys and values are rounded to, that of products with weights; None to leave them.
    """

    chunk: int | None = None
    operands: str | None = None

    @classmethod
    def made(cls, compute: Compute) -> Chunked:
        return cls(compute.attention_chunk, compute.operands)

    @classmethod
    def supports(cls, demand: Demand, compute: Compute) -> str | None:
        if not compute.fused:
            return "compute.fused is false"
        if demand.shows is not None:
            return f"all logits are needed: {demand.shows}"
        if demand.queries == 1:
            return "one query: its logits are no more than its entries"
        if demand.position.sequential and not demand.ordered:
            return f"{demand.position.kind} needs entries in the order of their positions"
        return None

    def apply(self, query: Query, parts: Sequence[Part], scores: Scores) -> Out:
        kind, length = query[0].dtype, query[0].shape[3]
        parts = [part for part in parts if part.entries.position.shape[-1]]
        recalled = tuple(part.recalled for part in parts)
        if self.operands is not None:
            operand = jnp.dtype(self.operands)
            query, recalled = jax.tree.map(lambda x: x.astype(operand), (query, recalled))
        rows = Cut.of(length, self.chunk)
        keys = tuple(
            rows if part.mask.aligned else Cut.of(part.entries.position.shape[-1], self.chunk)
            for part in parts
        )
        moving = _Moving(
            tuple(rows.padded(piece, 3) for piece in query),
            tuple(
                jax.tree.map(partial(cut.padded, axis=2), one)
                for cut, one in zip(keys, recalled, strict=True)
            ),
            rows.padded(scores.query if scores.position.biases else None, 3),
            scores.weights,
            scores.sinks,
        )
        fixed = _Fixed(
            rows.padded(scores.query_position, 1),
            tuple(Places.of(part, rows, cut) for part, cut in zip(parts, keys, strict=True)),
        )
        (moved, moving_tree), (placed, fixed_tree) = map(jax.tree.flatten, (moving, fixed))
        loops = _Loops(
            rows,
            keys,
            tuple((p.mask.window, p.mask.aligned, p.entries.ordered) for p in parts),
            scores.position,
            scores.scale,
            scores.softcap,
            moving_tree,
            fixed_tree,
        )
        out: Array = _attend(loops, moved, placed)
        return out[:, :, :, :length].astype(kind)


class _Moving(NamedTuple):
    """What gets a gradient. asked: queries as a bias sees them; None where nothing is biased."""

    query: Any
    recalled: Any
    asked: Any
    weights: Any
    sinks: Any


class _Fixed(NamedTuple):
    """What gets no gradient: positions of queries, and of each bag."""

    position: Any
    places: tuple[Places, ...]


@dataclass(frozen=True)
class _Loops:
    """The two passes over all pairs of pieces. masks: of each bag its window, whether it is
    aligned with the queries, and whether it is ordered. Trees: of `_Moving` and `_Fixed`."""

    rows: Cut
    keys: tuple[Cut, ...]
    masks: tuple[tuple[int | None, bool, bool], ...]
    position: AnyPosition
    scale: float
    softcap: float | None
    moving_tree: Any
    fixed_tree: Any

    def forward(self, moving: _Moving, fixed: _Fixed) -> tuple[Array, Array]:
        """What was read, and the logarithm of the sum, [batch kv_heads group query]; float32."""
        shape, width = moving.query[0].shape[:-1], moving.recalled[0].width
        if moving.sinks is None:
            top, total = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
        else:
            sinks = moving.sinks.astype(jnp.float32)[..., None]
            top, total = jnp.broadcast_to(sinks, shape), jnp.ones(shape)
        after = jnp.zeros(shape) if self.position.sequential else None
        state = (top, total, jnp.zeros((*shape, width)), after)
        for bag in reversed(range(len(self.keys))):
            state = self._each(bag, fixed, partial(self._absorb, bag, moving, fixed), state)
        top, total, out, _ = state
        safe = jnp.where(total > 0, total, 1.0)
        return out / safe[..., None], finite(top) + jnp.log(safe)

    def _absorb(
        self, bag: int, moving: _Moving, fixed: _Fixed, state: Any, i: Array, j: Array, _: Array
    ) -> Any:
        """Add block j of the bag to the softmax of chunk i."""
        rows = self.rows
        top, total, out, after = jax.tree.map(lambda x: rows.take(x, i, 3), state)
        recalled = self._block(bag, moving, j)
        masked, after = self._logits(bag, *self._chunk(moving, i), recalled, after, fixed, i, j)
        higher = jnp.maximum(top, jnp.max(masked, axis=-1))
        safe = finite(higher)
        weights, shrink = jnp.exp(masked - safe[..., None]), jnp.exp(top - safe)
        total = total * shrink + jnp.sum(weights, axis=-1)
        out = out * shrink[..., None] + recalled.mixture(weights)
        new = (higher, total, out, after)
        return jax.tree.map(lambda x, piece: rows.put(x, piece, i, 3), state, new)

    def backward(
        self, moving: _Moving, fixed: _Fixed, out: Array, norm: Array, gradient: Array
    ) -> _Moving:
        """Gradients of `moving`, float32. out, norm: as `forward` gave them.

        With the sum's logarithm L held fixed, out = sum of exp(logit - L) value and the weights
        add up to 1; a change of L takes `share` = gradient . out from each weight's gradient.
        """
        share = jnp.sum(gradient * out, axis=-1)
        known = (gradient, -share, norm)
        wide = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), moving)
        passed = jnp.zeros(share.shape) if self.position.sequential else None
        afters = (
            self._afters(moving, fixed) if self.position.sequential else [None] * len(self.keys)
        )
        state = (wide, passed)
        for bag in range(len(self.keys)):
            step = partial(self._return, bag, moving, fixed, known, afters[bag])
            state = self._each(bag, fixed, step, state, reverse=True)
        found = state[0]
        if moving.sinks is not None:
            sinks = with_rank(moving.sinks.astype(jnp.float32)[..., None], norm.ndim)
            weight = jnp.exp(sinks - norm)
            found = found._replace(sinks=-jnp.sum(weight * share, axis=(0, 3)))
        return found

    def _return(
        self,
        bag: int,
        moving: _Moving,
        fixed: _Fixed,
        known: Any,
        afters: Any,
        state: Any,
        i: Array,
        j: Array,
        number: Array,
    ) -> Any:
        """Add what block j of the bag and chunk i give to the gradients."""
        found, passed = state
        rows, keys = self.rows, self.keys[bag]
        gradient, share, norm = (rows.take(x, i, 3) for x in known)
        after = None if afters is None else afters[number]

        def mixed(query: Any, asked: Any, weights: Any, recalled: Any, after: Any) -> Any:
            masked, after = self._logits(bag, query, asked, weights, recalled, after, fixed, i, j)
            weight = jnp.exp(masked - norm[..., None])
            return recalled.mixture(weight), jnp.sum(weight, axis=-1), after

        block = self._block(bag, moving, j)
        _, pull = jax.vjp(mixed, *self._chunk(moving, i), block, after)
        left = None if passed is None else rows.take(passed, i, 3)
        query, asked, weights, recalled, after = pull((gradient, share, left))

        def add(cut: Cut, axis: int, whole: Any, piece: Any) -> Any:
            def one(x: Array, y: Array) -> Array:
                return cut.add(x, y.astype(jnp.float32), i if axis == 3 else j, axis)

            return jax.tree.map(one, whole, piece)

        bags = list(found.recalled)
        bags[bag] = add(keys, 2, bags[bag], recalled)
        found = found._replace(
            query=add(rows, 3, found.query, query),
            recalled=tuple(bags),
            asked=add(rows, 3, found.asked, asked),
            weights=jax.tree.map(jnp.add, found.weights, weights),
        )
        return found, None if passed is None else rows.put(passed, after, i, 3)

    def _afters(self, moving: _Moving, fixed: _Fixed) -> list[Array]:
        """What the blocks to the right left to know, for each pair of each bag:
        [pair batch kv_heads group query]."""
        shape = (*moving.query[0].shape[:3], self.rows.size)
        after = jnp.zeros((*shape[:3], self.rows.size * self.rows.number))
        found: list[Array] = []

        def step(bag: int, state: Any, i: Array, j: Array, number: Array) -> Any:
            after, kept = state
            own = self.rows.take(after, i, 3)
            block = self._block(bag, moving, j)
            _, left = self._logits(bag, *self._chunk(moving, i), block, own, fixed, i, j)
            return self.rows.put(after, left, i, 3), kept.at[number].set(own)

        for bag in reversed(range(len(self.keys))):
            kept = jnp.zeros((len(self._pairs(bag, fixed)[0]), *shape))
            after, kept = self._each(bag, fixed, partial(step, bag), (after, kept))
            found.insert(0, kept)
        return found

    def _chunk(self, moving: _Moving, i: Array) -> tuple[Any, Any, Any]:
        """Chunk i of the queries, twice, and the weights of the position encoding."""
        query, asked = jax.tree.map(lambda x: self.rows.take(x, i, 3), (moving.query, moving.asked))
        return query, asked, moving.weights

    def _block(self, bag: int, moving: _Moving, j: Array) -> Any:
        """Block j of a bag."""
        return jax.tree.map(lambda x: self.keys[bag].take(x, j, 2), moving.recalled[bag])

    def _logits(
        self,
        bag: int,
        query: Any,
        asked: Any,
        weights: Any,
        recalled: Any,
        after: Any,
        fixed: _Fixed,
        i: Array,
        j: Array,
    ) -> tuple[Array, Any]:
        """Logits of a pair, -inf where nothing is visible; and what the block leaves to know."""
        rows, keys, (window, _, ordered) = self.rows, self.keys[bag], self.masks[bag]
        places, position = fixed.places[bag], rows.take(fixed.position, i, 1)
        here = (places.position, places.valid, places.segment)
        entries = Entries({}, *(keys.take(x, j, 2) for x in here), ordered=ordered)
        asking = rows.take(places.asking, i, 1)
        visible = Mask(asking, window).visible(position, entries)
        shown = Shown(entries.position, visible, ordered)
        scores = Scores(asked, position, weights, None, self.position, self.scale, self.softcap)
        products = recalled.products(query)
        if self.position.sequential:
            logits, after = scores.block(products, shown, after)
        else:
            logits = scores.logits(products, shown)
        return jnp.where(visible[:, :, None], logits, -jnp.inf), after

    def _pairs(self, bag: int, fixed: _Fixed) -> tuple[Any, Any]:
        window, aligned, _ = self.masks[bag]
        if aligned:
            return aligned_pairs(self.rows, self.keys[bag], window)
        return pairs(self.rows, self.keys[bag], window, fixed.position, fixed.places[bag])

    def _each(
        self,
        bag: int,
        fixed: _Fixed,
        step: Callable[..., Any],
        state: Any,
        reverse: bool = False,
    ) -> Any:
        """step(state, chunk, block, number of the pair) for all pairs of a bag: chunk by chunk,
        blocks right to left, or all in reverse."""
        found, count = self._pairs(bag, fixed)
        found = jnp.asarray(found)

        def body(number: Any, state: Any) -> Any:
            number = jnp.asarray(number)  # a Python number where nothing is compiled
            number = count - 1 - number if reverse else number
            return step(state, found[number, 0], found[number, 1], number)

        return jax.lax.fori_loop(0, count, body, state)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(loops: _Loops, moving: list[Array], fixed: list[Array]) -> Array:
    return _attend_forward(loops, moving, fixed)[0]


def _attend_forward(loops: _Loops, moving: list[Array], fixed: list[Array]) -> tuple[Array, Any]:
    arguments = loops.moving_tree.unflatten(moving), loops.fixed_tree.unflatten(fixed)
    out, norm = loops.forward(*arguments)
    return out, (moving, fixed, out, norm)


def _attend_backward(loops: _Loops, saved: Any, gradient: Array) -> tuple[list[Array], None]:
    moving, fixed, out, norm = saved
    arguments = loops.moving_tree.unflatten(moving), loops.fixed_tree.unflatten(fixed)
    found = jax.tree.leaves(loops.backward(*arguments, out, norm, gradient))
    return [one.astype(x.dtype) for one, x in zip(found, moving, strict=True)], None


_attend.defvjp(_attend_forward, _attend_backward)
