"""FlashAttention-2 (Dao 2023) for GPUs, as Pallas kernels that Triton compiles.

Each program of the forward pass holds a chunk of queries and visits the blocks of keys that one of
them may see, from the first to the last. The backward pass has a kernel per chunk of queries and
one per block of keys; both recompute the weights from the log-sum-exp of each query. Packed
documents, windows, soft caps and sinks are part of the kernels; position biases are not.

The kernels take float32 sums of products of bfloat16 or float32 operands. On a mesh they run on
each shard of rows, KV heads and queries, since XLA's partitioner can't split a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mukv.attention.cores.pairs import Division
from mukv.core.typing import Array


class Where(NamedTuple):
    """Inputs of the mask; int32.

    position, document: of each query [batch token]
    key_position, key_document: of each key [batch token]
    first, last: first block that a query of each chunk sees, and the one after the last
        [batch chunk]
    start, stop: first chunk that sees each block, and the one after the last [batch block]

    A chunk or block that sees or is seen by none may have any.
    """

    position: Any
    document: Any
    key_position: Any
    key_document: Any
    first: Any
    last: Any
    start: Any
    stop: Any


@dataclass(frozen=True)
class Kernels:
    """The three kernels of one shape.

    rows, blocks: division of queries into chunks and of keys into blocks
    window, softcap: as in `Mask` and `Scores`
    """

    rows: Division
    blocks: Division
    window: int | None
    softcap: float | None
    interpret: bool

    def capped(self, products: Array) -> Array:
        """Bound products of queries and keys."""
        if self.softcap is None:
            return products
        return self.softcap * jnp.tanh(products / self.softcap)

    def logits(self, query: Array, key: Array, where: Where, i: Array, j: Array) -> Array:
        """Compute the logits of chunk i and block j, -inf where a key is not seen; float32."""
        rows, keys = self.chunk(i), self.block(j)
        products = self.capped(_product(query, key.T))
        distance = where.position[rows][:, None] - where.key_position[keys][None]
        seen = (distance >= 0) & (where.document[rows][:, None] == where.key_document[keys][None])
        if self.window is not None:
            seen &= distance < self.window
        return jnp.where(seen, products, -jnp.inf)

    def chunk(self, number: Array) -> Any:
        """Return the places of a chunk of queries."""
        return pl.ds(number * self.rows.size, self.rows.size)

    def block(self, number: Array) -> Any:
        """Return the places of a block of keys."""
        return pl.ds(number * self.blocks.size, self.blocks.size)

    def forward(self, q: Any, k: Any, v: Any, sink: Any, *rest: Any) -> None:
        """Write the output and the log-sum-exp of one chunk of queries of one head."""
        *where, out, norm = rest
        where, i, query = Where(*where), pl.program_id(0), q[...]

        def visit(j: Array, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            top, total, mixed = state
            masked = self.logits(query, k[self.block(j)], where, i, j)
            higher = jnp.maximum(top, jnp.max(masked, axis=1))
            safe = jnp.where(higher == -jnp.inf, 0.0, higher)
            weights, shrink = jnp.exp(masked - safe[:, None]), jnp.exp(top - safe)
            value = v[self.block(j)]
            mixed = mixed * shrink[:, None] + _product(weights.astype(value.dtype), value)
            return higher, total * shrink + jnp.sum(weights, axis=1), mixed

        rows = self.rows.size
        top = jnp.zeros(rows, jnp.float32) + sink[0]
        total = jnp.where(top == -jnp.inf, 0.0, 1.0)
        mixed = jnp.zeros((rows, v.shape[-1]), jnp.float32)
        top, total, mixed = jax.lax.fori_loop(
            where.first[i], where.last[i], visit, (top, total, mixed)
        )
        safe = jnp.where(total > 0, total, 1.0)
        out[...] = (mixed / safe[:, None]).astype(out.dtype)
        norm[...] = jnp.where(top == -jnp.inf, 0.0, top) + jnp.log(safe)

    def logit_gradient(
        self, masked: Array, weights: Array, value: Array, gradient: Array, share: Array
    ) -> Array:
        """Return the gradient of the products of queries and keys.

        masked: logits. weights: attention weights. share: gradient . output of each query
        """
        slope = weights * (_product(gradient, value.T) - share[:, None])
        if self.softcap is None:
            return slope
        bent = jnp.where(masked == -jnp.inf, 0.0, masked / self.softcap)
        return slope * (1 - bent * bent)

    def query_gradient(self, q: Any, k: Any, v: Any, *rest: Any) -> None:
        """Write the gradient of one chunk of queries of one head."""
        *where, norm, share, gradient, out = rest
        where, i, query = Where(*where), pl.program_id(0), q[...]

        def visit(j: Array, total: Array) -> Array:
            key = k[self.block(j)]
            masked = self.logits(query, key, where, i, j)
            weights = jnp.exp(masked - norm[...][:, None])
            slope = self.logit_gradient(
                masked, weights, v[self.block(j)], gradient[...], share[...]
            )
            return total + _product(slope.astype(key.dtype), key)

        total = jnp.zeros(query.shape, jnp.float32)
        out[...] = jax.lax.fori_loop(where.first[i], where.last[i], visit, total).astype(out.dtype)

    def key_gradients(self, q: Any, k: Any, v: Any, *rest: Any) -> None:
        """Write the gradients of one block of keys and values of one KV head, summed over the
        query heads of its group."""
        *where, norm, share, gradient, to_key, to_value = rest
        where, j, key, value = Where(*where), pl.program_id(0), k[...], v[...]
        start = where.start[j]
        chunks = jnp.maximum(where.stop[j] - start, 0)

        def visit(number: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
            head, i = number // chunks, start + number % chunks
            rows = self.chunk(i)
            query, slope_out = q[head, rows], gradient[head, rows]
            masked = self.logits(query, key, where, i, j)
            weights = jnp.exp(masked - norm[head, rows][:, None])
            slope = self.logit_gradient(masked, weights, value, slope_out, share[head, rows])
            keys, values = state
            keys = keys + _product(slope.astype(query.dtype).T, query)
            return keys, values + _product(weights.astype(slope_out.dtype).T, slope_out)

        state = (jnp.zeros(key.shape, jnp.float32), jnp.zeros(value.shape, jnp.float32))
        keys, values = jax.lax.fori_loop(0, q.shape[0] * chunks, visit, state)
        to_key[...], to_value[...] = keys.astype(to_key.dtype), values.astype(to_value.dtype)

    def call(
        self,
        kernel: Callable[..., None],
        cut: Division,
        heads: int,
        given: Sequence[Any],
        made: Sequence[Any],
    ) -> Any:
        """Run a kernel once per piece of `cut` (chunk or block), head and row.

        given: array and BlockSpec of each argument
        made: shape and BlockSpec of each result
        """
        rows = given[0][0].shape[0]
        return pl.pallas_call(
            kernel,
            grid=(cut.number, heads, rows),
            in_specs=[spec for _, spec in given],
            out_specs=[spec for _, spec in made],
            out_shape=[jax.ShapeDtypeStruct(like.shape, like.dtype) for like, _ in made],
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=self.interpret,
            name=f"flash_{kernel.__name__}",
        )(*(array for array, _ in given))

    def piece(self, cut: Division, array: Any) -> Any:
        """Refer to one chunk or block of an array [batch heads token ...]."""
        rest = array.shape[3:]
        return array, pl.BlockSpec(
            (None, None, cut.size, *rest), lambda i, h, b: (b, h, i, *(0,) * len(rest))
        )

    def whole(self, array: Any, group: int = 1) -> Any:
        """Refer to one head of an array [batch heads ...]. group: grid's heads per head of it"""
        rest = array.shape[2:]
        return array, pl.BlockSpec(
            (None, None, *rest), lambda i, h, b: (b, h // group, *(0,) * len(rest))
        )

    def row(self, array: Any) -> Any:
        """Refer to one row of an array [batch ...]."""
        return array, pl.BlockSpec((None, array.shape[1]), lambda i, h, b: (b, 0))


def _product(x: Array, y: Array) -> Array:
    """Multiply two matrices with float32 sums."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(kernels: Kernels, query: Array, key: Array, value: Array, *rest: Array) -> Array:
    """Return softmax(query . key) value [batch kv_heads group token width].

    query: [batch kv_heads group token width]
    key, value: [batch kv_heads token width]
    rest: logit of the sink of each head [kv_heads group], and the fields of `Where`
    """
    return _attend_forward(kernels, query, key, value, *rest)[0]


def _attend_forward(
    kernels: Kernels, query: Array, key: Array, value: Array, sinks: Array, *where: Array
) -> tuple[Array, Any]:
    batch, kv_heads, group, length, _ = query.shape
    heads = kv_heads * group
    flat = query.reshape(batch, heads, length, -1)
    piece = partial(kernels.piece, kernels.rows)
    given = (
        piece(flat),
        kernels.whole(key, group),
        kernels.whole(value, group),
        (sinks.reshape(-1), pl.BlockSpec((1,), lambda i, h, b: (h,))),
        *map(kernels.row, where),
    )
    out = jax.ShapeDtypeStruct((batch, heads, length, value.shape[-1]), query.dtype)
    norm = jax.ShapeDtypeStruct(out.shape[:3], jnp.float32)
    made = tuple(map(piece, (out, norm)))
    out, norm = kernels.call(kernels.forward, kernels.rows, heads, given, made)
    out = out.reshape(*query.shape[:4], -1)
    return out, (query, key, value, sinks, where, out, norm)


def _attend_backward(kernels: Kernels, saved: Any, gradient: Array) -> tuple[Any, ...]:
    query, key, value, sinks, where, out, norm = saved
    batch, kv_heads, group, length, _ = query.shape
    heads = kv_heads * group
    share = jnp.sum(gradient.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def flat(x: Array) -> Array:
        return x.reshape(batch, heads, length, *x.shape[4:])

    rows = tuple(map(kernels.row, where))
    chunk, block = partial(kernels.piece, kernels.rows), partial(kernels.piece, kernels.blocks)
    by_query = (
        chunk(flat(query)),
        *(kernels.whole(x, group) for x in (key, value)),
        *rows,
        *map(chunk, (norm, flat(share), flat(gradient))),
    )
    (to_query,) = kernels.call(
        kernels.query_gradient, kernels.rows, heads, by_query, (chunk(flat(query)),)
    )
    by_key = (
        kernels.whole(query),
        *map(block, (key, value)),
        *rows,
        *map(kernels.whole, (norm.reshape(share.shape), share, gradient)),
    )
    to_key, to_value = kernels.call(
        kernels.key_gradients, kernels.blocks, kv_heads, by_key, tuple(map(block, (key, value)))
    )
    weight = jnp.exp(sinks[None, :, :, None] - norm.reshape(share.shape))
    to_sinks = -jnp.sum(weight * share, axis=(0, 3))
    return to_query.reshape(query.shape), to_key, to_value, to_sinks, *(None for _ in where)


attend.defvjp(_attend_forward, _attend_backward)
