"""The gated delta rule (Yang et al. 2024), chunk by chunk, without a tensor of all pairs of tokens.

A state S, [key_dim value_dim] per head, follows

    S_t = diag(e^g_t) S_{t-1} + k_t (x) beta_t (v_t - (diag(e^g_t) S_{t-1})^T k_t)
    o_t = S_t^T q_t

with one log decay g per token (Gated DeltaNet) or one per token and key channel (Kimi Delta
Attention). Within a chunk all tokens are computed at once by the WY representation: a unit lower
triangular inverse; a scan over chunks carries S. All numbers are float32, and no exponential has a
positive argument.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mukv.core.linear import matmul
from mukv.core.typing import Array, Bool, Float, Int

CHUNK = 32
"""Largest number of tokens per chunk, a power of two. On a CPU 16 is 2 to 10 % faster, and 64 and
128 are slower (`benchmarks/delta_rule.py`)."""
PART = 256
"""Largest number of tokens whose chunks are prepared at once; a multiple of CHUNK. Preparation is
everything that does not depend on the state: products of pairs of tokens, and inverses."""


class DeltaRows(NamedTuple):
    """Inputs of the delta rule for each token, float32.

    query, key: as they are multiplied with the state
    value: value v_t
    decay: log decay g_t, at most 0; one number per head, or one per head and key channel
    beta: beta_t, the fraction of (value - value that the key reads) that is written
    """

    query: Float[Array, "batch token heads key_dim"]
    key: Float[Array, "batch token heads key_dim"]
    value: Float[Array, "batch token heads value_dim"]
    decay: Float[Array, "batch token heads decay_dim"]
    beta: Float[Array, "batch token heads"]


def delta_rule(
    rows: DeltaRows,
    first: Bool[Array, "batch token"],
    state: Float[Array, "batch heads key_dim value_dim"],
    chunk: int = CHUNK,
    part: int = PART,
) -> tuple[
    Float[Array, "batch token heads value_dim"], Float[Array, "batch heads key_dim value_dim"]
]:
    """Compute the output o_t of each token and the state after the last token.

    first: whether a token is the first of a document, which starts with a state of zeros
    state: state before the first token
    chunk: largest number of tokens per chunk, a power of two
    part: largest number of tokens whose chunks are prepared at once; the backward pass recomputes
        each part from the state before it, so that only states and inputs are stored

    A token with decay 0 and beta 0 leaves the state as it is.
    """
    length = rows.value.shape[1]
    if length <= part:
        return _part(rows, first, state, chunk)
    padding = -length % part

    def parts(array: Array) -> Array:
        """[batch token ...] to [parts batch part ...]; padding is zeros, which change nothing."""
        wide = jnp.pad(array, ((0, 0), (0, padding), *((0, 0),) * (array.ndim - 2)))
        return wide.reshape(len(wide), -1, part, *wide.shape[2:]).swapaxes(0, 1)

    @jax.checkpoint
    def one(state: Array, given: tuple[DeltaRows, Array]) -> tuple[Array, Array]:
        read, state = _part(*given, state, chunk)
        return state, read

    state, read = jax.lax.scan(one, state, jax.tree.map(parts, (rows, first)))
    read = read.swapaxes(0, 1).reshape(len(first), -1, *read.shape[3:])
    return read[:, :length], state


def _part(
    rows: DeltaRows,
    first: Bool[Array, "batch token"],
    state: Float[Array, "batch heads key_dim value_dim"],
    chunk: int,
) -> tuple[
    Float[Array, "batch token heads value_dim"], Float[Array, "batch heads key_dim value_dim"]
]:
    """Compute `delta_rule` for at most `part` tokens: all chunks at once, then a scan over them."""
    batch, length, heads, _ = rows.value.shape
    size = min(chunk, 1 << (length - 1).bit_length())
    padding = -length % size

    def chunked(array: Array) -> Array:
        """[batch token heads width] to [batch heads chunks size width]; padding is zeros."""
        wide = jnp.pad(array, ((0, 0), (0, padding), (0, 0), (0, 0)))
        wide = wide.reshape(batch, -1, size, *array.shape[2:])
        return wide.transpose(0, 3, 1, 2, 4)

    query, key, value, decay, beta = map(chunked, rows._replace(beta=rows.beta[..., None]))
    document = jnp.cumsum(jnp.pad(first, ((0, 0), (0, padding))), axis=1)
    borders = _Borders.of(document.reshape(batch, 1, -1, size))
    pairs = _pairs(*(array.reshape(-1, *array.shape[3:]) for array in (query, key, decay)))
    pairs = _Pairs(*(array.reshape(*query.shape[:3], *array.shape[1:]) for array in pairs))
    reads = jnp.where(borders.same, pairs.reads, 0)
    corrections = jnp.where(borders.same, beta * pairs.corrections, 0)
    inverse = unit_lower_inverse(corrections.reshape(-1, size, size)).reshape(corrections.shape)
    begun = jnp.where(borders.continued, jnp.exp(pairs.before), 0)
    written = _product(inverse, beta * value)
    removed = _product(inverse, beta * begun * key)
    kept = jnp.where(borders.lasting, jnp.exp(pairs.after), 0) * key
    whole = jnp.where(borders.whole, jnp.exp(pairs.before[..., -1:, :]), 0).swapaxes(-1, -2)

    def step(state: Array, given: tuple[Array, ...]) -> tuple[Array, Array]:
        asked, written, reads, kept, whole = given
        found = _product(asked, state)
        new = written - found[:, :, :size]
        read = found[:, :, size:] + _product(reads, new)
        return whole * state + _product(kept.swapaxes(-1, -2), new), read

    asked = jnp.concatenate([removed, begun * query], axis=-2)
    given = tuple(jnp.moveaxis(array, 2, 0) for array in (asked, written, reads, kept, whole))
    if len(given[0]) == 1:  # decoding: no loop within the loop over tokens
        state, read = step(state, tuple(array[0] for array in given))
        read = read[None]
    else:
        state, read = jax.lax.scan(step, state, given)
    read = read.transpose(1, 0, 3, 2, 4).reshape(batch, -1, heads, value.shape[-1])
    return read[:, :length], state


class _Borders(NamedTuple):
    """Masks by the documents of the tokens of each chunk.

    same: whether two tokens are of one document
    continued: whether a token is of the document that the chunk's initial state belongs to
    lasting: whether a token is of the document of the chunk's last token
    whole: whether the last token is of the document of the initial state
    """

    same: Bool[Array, "batch 1 chunks size size"]
    continued: Bool[Array, "batch 1 chunks size 1"]
    lasting: Bool[Array, "batch 1 chunks size 1"]
    whole: Bool[Array, "batch 1 chunks 1 1"]

    @classmethod
    def of(cls, document: Int[Array, "batch 1 chunks size"]) -> _Borders:
        """Compute the masks.

        document: number of each token's document in its row, from 1; 0 for tokens of the document
            that the state before the row belongs to
        """
        last = document[..., -1:]
        before = jnp.pad(last[:, :, :-1], ((0, 0), (0, 0), (1, 0), (0, 0)))
        return cls(
            document[..., :, None] == document[..., None, :],
            (document == before)[..., None],
            (document == last)[..., None],
            (last == before)[..., None],
        )


class _Pairs(NamedTuple):
    """Products of two tokens r and j of a chunk, where G is the cumulative sum of log decays.

    reads: sum_c q_rc k_jc e^(G_rc - G_jc) for j <= r, else 0
    corrections: sum_c k_rc k_jc e^(G_rc - G_jc) for j < r, else 0
    before: sum of the log decays up to each token, itself included
    after: sum of the log decays of all later tokens
    """

    reads: Float[Array, "*batch size size"]
    corrections: Float[Array, "*batch size size"]
    before: Float[Array, "*batch size decay_dim"]
    after: Float[Array, "*batch size decay_dim"]


def _pairs(
    query: Float[Array, "chunks size key_dim"],
    key: Float[Array, "chunks size key_dim"],
    decay: Float[Array, "chunks size decay_dim"],
) -> _Pairs:
    """Compute the products of all pairs of tokens of a chunk by recursive halving.

    For r in the second half and j in the first one, G_r - G_j is the sum of the decays in the
    second half up to r plus that in the first half after j. Its exponential is a product of two
    numbers that are at most 1, one for each token, so that all blocks of one size are one product
    of matrices. (e^(G_r) e^(-G_j) would overflow, and G_r - G_j would lose digits.)
    """
    size = key.shape[-2]
    reads = jnp.sum(query * key, axis=-1)[..., None, None]
    corrections = jnp.zeros_like(reads)
    before, after = decay, jnp.zeros_like(decay)
    width = 1
    while width < size:

        def halves(array: Array, width: int = width) -> tuple[Array, Array]:
            """[chunks size dim] to two of [chunks pairs width dim]"""
            both = array.reshape(len(array), -1, 2, width, array.shape[-1])
            return both[:, :, 0], both[:, :, 1]

        def whole(early: Array, later: Array) -> Array:
            return jnp.concatenate([early, later], axis=-2).reshape(decay.shape)

        (_, later_query), (early_key, later_key) = halves(query), halves(key)
        (early_before, later_before), (early_after, later_after) = halves(before), halves(after)
        factor = jnp.exp(jnp.concatenate([later_before] * 2, axis=-2))
        left = jnp.concatenate([later_query, later_key], axis=-2) * factor
        blocks = _product(left, (early_key * jnp.exp(early_after)).swapaxes(-1, -2))
        of_query, of_key = jnp.split(blocks, 2, axis=-2)
        reads, corrections = _joined(reads, of_query), _joined(corrections, of_key)
        before = whole(early_before, early_before[..., -1:, :] + later_before)
        after = whole(early_after + later_before[..., -1:, :], later_after)
        width *= 2
    return _Pairs(reads[:, 0], corrections[:, 0], before, after)


@jax.custom_vjp
def unit_lower_inverse(lower: Float[Array, "chunks size size"]) -> Float[Array, "chunks size size"]:
    """Invert I + lower, where `lower` is strictly lower triangular and its size a power of two.

    Blocks on the diagonal are inverted and joined in pairs: the inverse of [[A, 0], [B, C]] is
    [[A', 0], [-C' B A', C']]. These are products of matrices, which are faster than a substitution
    row by row and, unlike powers of `lower`, as accurate.
    """
    chunks, size, _ = lower.shape
    found = jnp.ones((chunks, size, 1, 1), lower.dtype)
    width = 1
    while width < size:
        blocks = lower.reshape(chunks, -1, 2 * width, size // (2 * width), 2 * width)
        # The blocks on the diagonal of pairs, second half by first half.
        pairs = jnp.moveaxis(jnp.diagonal(blocks, axis1=1, axis2=3), -1, 1)
        below = pairs[:, :, width:, :width]
        early, later = found[:, 0::2], found[:, 1::2]
        found = _joined(found, -_product(_product(later, below), early))
        width *= 2
    return found[:, 0]


def _inverse_backward(inverse: Array, gradient: Array) -> tuple[Array]:
    turned = inverse.swapaxes(-1, -2)
    return (-_product(_product(turned, gradient), turned),)


unit_lower_inverse.defvjp(lambda lower: (unit_lower_inverse(lower),) * 2, _inverse_backward)


def _joined(
    diagonal: Float[Array, "chunks blocks width width"],
    below: Float[Array, "chunks pairs width width"],
) -> Float[Array, "chunks pairs double double"]:
    """Join pairs of lower triangular blocks: [[first, 0], [below, second]]."""
    early, later = diagonal[:, 0::2], diagonal[:, 1::2]
    above = jnp.concatenate([early, jnp.zeros_like(below)], axis=-1)
    return jnp.concatenate([above, jnp.concatenate([below, later], axis=-1)], axis=-2)


def _product(
    x: Float[Array, "*batch rows inner"], y: Float[Array, "*batch inner columns"]
) -> Float[Array, "*batch rows columns"]:
    """Multiply matrices in float32, also on platforms whose default precision is lower."""
    return matmul(x, y, jax.lax.Precision.HIGHEST)
