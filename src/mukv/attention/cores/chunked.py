"""Attention by blocks of queries and keys with an online softmax (FlashAttention, Dao et al. 2022).

No token x token tensor exists in the forward or the backward pass. A loop visits the pairs (chunk
of queries, block of keys) in which some query may see some key, and holds the logits of one pair.
The forward pass saves the output and the log-sum-exp of each query; the backward pass recomputes
the weights of each pair from these. All bags of entries share one softmax: the running maximum, sum
and mixture of each query are carried from bag to bag.

The number of operations in the program does not depend on the number of tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mukv.attention.cores.base import Core, Demand, Out, Part, Scores, Shown, all_at_once, finite
from mukv.attention.cores.pairs import Division, Places, aligned_pairs, pairs
from mukv.attention.entries import Entries
from mukv.attention.mask import Mask
from mukv.attention.recalled import Query
from mukv.core.broadcast import with_rank
from mukv.core.compute import Compute
from mukv.core.typing import Array
from mukv.position import AnyPosition


@dataclass(frozen=True)
class Chunked(Core):
    """Core that visits blocks of queries and keys with an online softmax.

    chunk: size of a chunk of queries and of a block of keys; None for `chunk_size`
    operands: type that queries, keys and values are rounded to, as operands of products with
        weights are; None to keep their types
    """

    chunk: int | None = None
    operands: str | None = None

    @classmethod
    def made(cls, compute: Compute) -> Chunked:
        return cls(compute.attention_chunk, compute.operands)

    @classmethod
    def supports(cls, demand: Demand, compute: Compute) -> str | None:
        if demand.position.sequential and not demand.ordered:
            return f"{demand.position.kind} needs entries in the order of their positions"
        return all_at_once(demand, compute)

    def apply(self, query: Query, parts: Sequence[Part], scores: Scores) -> Out:
        kind, length = query[0].dtype, query[0].shape[3]
        parts = [part for part in parts if part.entries.position.shape[-1]]
        recalled = tuple(part.recalled for part in parts)
        if self.operands is not None:
            operand = jnp.dtype(self.operands)
            query, recalled = jax.tree.map(lambda x: x.astype(operand), (query, recalled))
        rows = Division.of(length, self.chunk)
        keys = tuple(
            rows if part.mask.aligned else Division.of(part.entries.position.shape[-1], self.chunk)
            for part in parts
        )
        inputs = _Differentiable(
            tuple(rows.padded(piece, 3) for piece in query),
            tuple(
                jax.tree.map(partial(cut.padded, axis=2), one)
                for cut, one in zip(keys, recalled, strict=True)
            ),
            rows.padded(scores.query if scores.position.biases else None, 3),
            scores.weights,
            scores.sinks,
        )
        constants = _Constant(
            rows.padded(scores.query_position, 1),
            tuple(Places.of(part, rows, cut) for part, cut in zip(parts, keys, strict=True)),
        )
        (input_leaves, input_tree), (constant_leaves, constant_tree) = map(
            jax.tree.flatten, (inputs, constants)
        )
        loops = _Loops(
            rows,
            keys,
            tuple((p.mask.window, p.mask.aligned, p.entries.ordered) for p in parts),
            scores.position,
            scores.scale,
            scores.softcap,
            input_tree,
            constant_tree,
        )
        out: Array = _attend(loops, input_leaves, constant_leaves)
        return out[:, :, :, :length].astype(kind)


class _Differentiable(NamedTuple):
    """Arrays that get a gradient. bias_query: queries for the position bias; None without bias."""

    query: Any
    recalled: Any
    bias_query: Any
    weights: Any
    sinks: Any


class _Constant(NamedTuple):
    """Arrays that get no gradient: positions of the queries, and of the entries of each bag."""

    position: Any
    places: tuple[Places, ...]


@dataclass(frozen=True)
class _Loops:
    """The forward and the backward pass over all pairs of a chunk and a block.

    rows: division of the queries into chunks
    keys: division of each bag into blocks
    masks: for each bag its window, whether it is aligned with the queries, and whether it is
        ordered
    position, scale, softcap: as in `Scores`
    input_tree, constant_tree: structure of `_Differentiable` and of `_Constant`
    """

    rows: Division
    keys: tuple[Division, ...]
    masks: tuple[tuple[int | None, bool, bool], ...]
    position: AnyPosition
    scale: float
    softcap: float | None
    input_tree: Any
    constant_tree: Any

    def forward(self, inputs: _Differentiable, constants: _Constant) -> tuple[Array, Array]:
        """Return the output and the log-sum-exp [batch kv_heads group query]; float32."""
        shape, width = inputs.query[0].shape[:-1], inputs.recalled[0].width
        if inputs.sinks is None:
            top, total = jnp.full(shape, -jnp.inf), jnp.zeros(shape)
        else:
            sinks = inputs.sinks.astype(jnp.float32)[..., None]
            top, total = jnp.broadcast_to(sinks, shape), jnp.ones(shape)
        carry = jnp.zeros(shape) if self.position.sequential else None
        state = (top, total, jnp.zeros((*shape, width)), carry)
        for bag in reversed(range(len(self.keys))):
            state = self._loop(
                bag, constants, partial(self._accumulate, bag, inputs, constants), state
            )
        top, total, out, _ = state
        safe = jnp.where(total > 0, total, 1.0)
        return out / safe[..., None], finite(top) + jnp.log(safe)

    def _accumulate(
        self,
        bag: int,
        inputs: _Differentiable,
        constants: _Constant,
        state: Any,
        i: Array,
        j: Array,
        _: Array,
    ) -> Any:
        """Add block j of the bag to the online softmax of chunk i."""
        rows = self.rows
        top, total, out, carry = jax.tree.map(lambda x: rows.take(x, i, 3), state)
        recalled = self._block(bag, inputs, j)
        masked, carry = self._logits(bag, *self._chunk(inputs, i), recalled, carry, constants, i, j)
        higher = jnp.maximum(top, jnp.max(masked, axis=-1))
        safe = finite(higher)
        weights, shrink = jnp.exp(masked - safe[..., None]), jnp.exp(top - safe)
        total = total * shrink + jnp.sum(weights, axis=-1)
        out = out * shrink[..., None] + recalled.mixture(weights)
        new = (higher, total, out, carry)
        return jax.tree.map(lambda x, piece: rows.put(x, piece, i, 3), state, new)

    def backward(
        self,
        inputs: _Differentiable,
        constants: _Constant,
        out: Array,
        norm: Array,
        gradient: Array,
    ) -> _Differentiable:
        """Return the gradients of `inputs`, float32. out, norm: results of `forward`.

        For fixed L = log-sum-exp, out = sum of exp(logit - L) value. Since the weights exp(logit -
        L) sum to one, the dependence of L on the logits subtracts gradient . out (`share`) from the
        gradient of each weight.
        """
        share = jnp.sum(gradient * out, axis=-1)
        known = (gradient, -share, norm)
        wide = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), inputs)
        carry_gradient = jnp.zeros(share.shape) if self.position.sequential else None
        carries = (
            self._saved_carries(inputs, constants)
            if self.position.sequential
            else [None] * len(self.keys)
        )
        state = (wide, carry_gradient)
        for bag in range(len(self.keys)):
            step = partial(self._accumulate_gradients, bag, inputs, constants, known, carries[bag])
            state = self._loop(bag, constants, step, state, reverse=True)
        found = state[0]
        if inputs.sinks is not None:
            sinks = with_rank(inputs.sinks.astype(jnp.float32)[..., None], norm.ndim)
            weight = jnp.exp(sinks - norm)
            found = found._replace(sinks=-jnp.sum(weight * share, axis=(0, 3)))
        return found

    def _accumulate_gradients(
        self,
        bag: int,
        inputs: _Differentiable,
        constants: _Constant,
        known: Any,
        carries: Any,
        state: Any,
        i: Array,
        j: Array,
        number: Array,
    ) -> Any:
        """Add the contributions of chunk i and block j of the bag to the gradients."""
        found, carry_gradient = state
        rows, keys = self.rows, self.keys[bag]
        gradient, share, norm = (rows.take(x, i, 3) for x in known)
        carry = None if carries is None else carries[number]

        def mixed(query: Any, bias_query: Any, weights: Any, recalled: Any, carry: Any) -> Any:
            masked, carry = self._logits(
                bag, query, bias_query, weights, recalled, carry, constants, i, j
            )
            weight = jnp.exp(masked - norm[..., None])
            return recalled.mixture(weight), jnp.sum(weight, axis=-1), carry

        block = self._block(bag, inputs, j)
        _, pull = jax.vjp(mixed, *self._chunk(inputs, i), block, carry)
        left = None if carry_gradient is None else rows.take(carry_gradient, i, 3)
        query, bias_query, weights, recalled, carry = pull((gradient, share, left))

        def add(cut: Division, axis: int, whole: Any, piece: Any) -> Any:
            def one(x: Array, y: Array) -> Array:
                return cut.add(x, y.astype(jnp.float32), i if axis == 3 else j, axis)

            return jax.tree.map(one, whole, piece)

        bags = list(found.recalled)
        bags[bag] = add(keys, 2, bags[bag], recalled)
        found = found._replace(
            query=add(rows, 3, found.query, query),
            recalled=tuple(bags),
            bias_query=add(rows, 3, found.bias_query, bias_query),
            weights=jax.tree.map(jnp.add, found.weights, weights),
        )
        return found, None if carry_gradient is None else rows.put(carry_gradient, carry, i, 3)

    def _saved_carries(self, inputs: _Differentiable, constants: _Constant) -> list[Array]:
        """Return the carry that each pair of each bag receives from the blocks to its right.

        The carries of a bag are [pair batch kv_heads group query].
        """
        shape = (*inputs.query[0].shape[:3], self.rows.size)
        carry = jnp.zeros((*shape[:3], self.rows.size * self.rows.number))
        found: list[Array] = []

        def step(bag: int, state: Any, i: Array, j: Array, number: Array) -> Any:
            carry, kept = state
            own = self.rows.take(carry, i, 3)
            block = self._block(bag, inputs, j)
            _, left = self._logits(bag, *self._chunk(inputs, i), block, own, constants, i, j)
            return self.rows.put(carry, left, i, 3), kept.at[number].set(own)

        for bag in reversed(range(len(self.keys))):
            kept = jnp.zeros((len(self._pairs(bag, constants)[0]), *shape))
            carry, kept = self._loop(bag, constants, partial(step, bag), (carry, kept))
            found.insert(0, kept)
        return found

    def _chunk(self, inputs: _Differentiable, i: Array) -> tuple[Any, Any, Any]:
        """Return chunk i of the queries and bias queries, and the position encoding's weights."""
        query, bias_query = jax.tree.map(
            lambda x: self.rows.take(x, i, 3), (inputs.query, inputs.bias_query)
        )
        return query, bias_query, inputs.weights

    def _block(self, bag: int, inputs: _Differentiable, j: Array) -> Any:
        """Return block j of the keys and values of a bag."""
        return jax.tree.map(lambda x: self.keys[bag].take(x, j, 2), inputs.recalled[bag])

    def _logits(
        self,
        bag: int,
        query: Any,
        bias_query: Any,
        weights: Any,
        recalled: Any,
        carry: Any,
        constants: _Constant,
        i: Array,
        j: Array,
    ) -> tuple[Array, Any]:
        """Return the logits of a pair, -inf for invisible keys, and the carry for the next
        block.
        """
        rows, keys, (window, _, ordered) = self.rows, self.keys[bag], self.masks[bag]
        places, position = constants.places[bag], rows.take(constants.position, i, 1)
        here = (places.position, places.valid, places.segment, places.until)
        *where, until = (keys.take(x, j, 2) for x in here)
        entries = Entries({}, *where, ordered=ordered, until=until)
        asking = rows.take(places.asking, i, 1)
        visible = Mask(asking, window).visible(position, entries)
        shown = Shown(entries.position, visible, ordered)
        scores = Scores(
            bias_query, position, weights, None, self.position, self.scale, self.softcap
        )
        products = recalled.products(query)
        if self.position.sequential:
            logits, carry = scores.block(products, shown, carry)
        else:
            logits = scores.logits(products, shown)
        logits = recalled.faded(logits, position, entries.position)
        return jnp.where(visible[:, :, None], logits, -jnp.inf), carry

    def _pairs(self, bag: int, constants: _Constant) -> tuple[Any, Any]:
        """Return the chunk and block of each pair with a visible key, and the number of pairs."""
        window, aligned, _ = self.masks[bag]
        if aligned:
            return aligned_pairs(self.rows, self.keys[bag], window)
        return pairs(self.rows, self.keys[bag], window, constants.position, constants.places[bag])

    def _loop(
        self,
        bag: int,
        constants: _Constant,
        step: Callable[..., Any],
        state: Any,
        reverse: bool = False,
    ) -> Any:
        """Fold step(state, chunk, block, number of the pair) over all pairs of a bag.

        Pairs are visited chunk by chunk with blocks from right to left, or in the reverse order.
        """
        found, count = self._pairs(bag, constants)
        found = jnp.asarray(found)

        def body(number: Any, state: Any) -> Any:
            number = jnp.asarray(number)  # a Python integer under jax.disable_jit
            number = count - 1 - number if reverse else number
            return step(state, found[number, 0], found[number, 1], number)

        return jax.lax.fori_loop(0, count, body, state)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(loops: _Loops, inputs: list[Array], constants: list[Array]) -> Array:
    return _attend_forward(loops, inputs, constants)[0]


def _attend_forward(
    loops: _Loops, inputs: list[Array], constants: list[Array]
) -> tuple[Array, Any]:
    arguments = loops.input_tree.unflatten(inputs), loops.constant_tree.unflatten(constants)
    out, norm = loops.forward(*arguments)
    return out, (inputs, constants, out, norm)


def _attend_backward(loops: _Loops, saved: Any, gradient: Array) -> tuple[list[Array], None]:
    inputs, constants, out, norm = saved
    arguments = loops.input_tree.unflatten(inputs), loops.constant_tree.unflatten(constants)
    found = jax.tree.leaves(loops.backward(*arguments, out, norm, gradient))
    return [one.astype(x.dtype) for one, x in zip(found, inputs, strict=True)], None


_attend.defvjp(_attend_forward, _attend_backward)
