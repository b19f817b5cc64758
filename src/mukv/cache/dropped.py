"""The entries that a policy drops while rows of known tokens are read in blocks, for training.

An entry that was dropped is never read again. What a policy chose is therefore one number for each
entry and head: the position of the last query that may see it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mukv.cache.base import Reader, SlotArrays
from mukv.cache.kept import Kept
from mukv.core.typing import Array, Int


class Blocks(NamedTuple):
    """Entries and queries of whole rows, which a policy reads.

    tensors: entries of all tokens, [batch heads token width] by name
    queries: queries of all tokens, [batch kv_heads group token query_dim]; None if the policy needs
        none
    position: place of each token in its document
    segment: number of each token's document; None for one document per row
    """

    tensors: SlotArrays
    queries: Any
    position: Int[Array, "batch token"]
    segment: Int[Array, "batch token"] | None


def last_positions(
    empty: Kept, tail: int, reader: Reader, rows: Blocks
) -> Int[Array, "batch heads token"] | None:
    """Return the position of the last query that may see each entry; None if no entry is dropped.

    Tokens are read in blocks of `tail`. The queries of a block read what was kept of the blocks
    before, and their own block; then the policy chooses what the next block may read, as at a fold
    of the tail in decoding. Each document begins with an empty body. Nothing is differentiated.

    empty: a body without entries
    reader: the layer that reads, without queries
    """
    batch, tokens = rows.position.shape
    choices = -(-tokens // tail) - 1
    if not choices:
        return None
    rows = jax.lax.stop_gradient(rows)
    heads = empty.shelf.there().shape[1]
    place = jnp.arange(tokens)
    own = rows.position + (tail - 1 - place % tail)[None]
    until = jnp.broadcast_to(own[:, None], (batch, heads, tokens))
    first, head = jnp.arange(batch)[:, None, None], jnp.arange(heads)[None, :, None]

    def choose(carry: tuple[Kept, Array], block: Array) -> tuple[tuple[Kept, Array], None]:
        body, until = carry

        def cut(array: Array, axis: int) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, block * tail, tail, axis)

        position = cut(rows.position, 1)
        last = position[:, -1]
        # The tokens of the document that goes on in the next block are the last ones of this block.
        same = position == last[:, None] - jnp.arange(tail)[None, ::-1]
        if rows.segment is not None:
            segment = cut(rows.segment, 1)
            same &= segment == segment[:, -1:]
        added = jnp.sum(same, axis=1)
        length = last + 1 - added
        order = (jnp.arange(tail)[None] + tail - added[:, None]) % tail

        def moved(array: Array, axis: int) -> Array:
            shape = [1] * array.ndim
            shape[0], shape[axis] = batch, tail
            return jnp.take_along_axis(cut(array, axis), order.reshape(shape), axis=axis)

        new = {name: moved(tensor, 2) for name, tensor in rows.tensors.items()}
        queries = None if rows.queries is None else moved(rows.queries, 3)
        body = _where(length == 0, empty, body)
        asked = Reader(reader.attention, reader.weights, queries)
        body = body.extended(new, length, added, asked)

        there = body.shelf.there()
        start = (block + 1) * tail - 1 - last
        index = jnp.where(there, body.shelf.position + start[:, None, None], tokens)
        next_block = (last + tail)[:, None, None]
        return (body, until.at[first, head, index].max(next_block, mode="drop")), None

    (_, until), _ = jax.lax.scan(choose, (empty, until), jnp.arange(choices))
    return until


def _where(which: Array, one: Kept, other: Kept) -> Kept:
    """Return the body whose rows are those of `one` where `which` is true."""

    def pick(x: Array, y: Array) -> Array:
        return jnp.where(which.reshape(-1, *(1,) * (x.ndim - 1)), x, y)

    return jax.tree.map(pick, one, other)
