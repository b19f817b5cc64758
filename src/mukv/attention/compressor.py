"""Compression of consecutive tokens into one entry, by a softmax per channel over their values.

The tokens of an entry may lie in several calls of `write` (prefill in pieces, decoding), so the
sums of the softmax are carried as a state. Entries overlap in CSA: each covers the tokens of its
own chunk and, through a second series of values, those of the chunk before.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mukv.attention.mixer import EntryStore, Tensors
from mukv.core.linear import project
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights


class ChunkPlaces(NamedTuple):
    """The chunks of tokens that become entries: [batch place].

    last: index of the last token of each chunk among the given tokens
    length: number of tokens of the chunk so far; 0 for none
    first: position of the chunk's first token in its document
    order: number of chunks that the given tokens complete before this one
    """

    last: Int[Array, "batch place"]
    length: Int[Array, "batch place"]
    first: Int[Array, "batch place"]
    order: Int[Array, "batch place"]

    @classmethod
    def of(
        cls, every: int, position: Int[Array, "batch token"], added: Int[Array, " batch"] | None
    ) -> ChunkPlaces:
        """Return the chunks of `every` tokens that these tokens complete.

        added: number of valid tokens of each row; with it, the last place is the chunk that these
            leave unfinished. None in training
        """
        last, _ = EntryStore(every).closing(position)
        first = jnp.take_along_axis(position, last, axis=1) - every + 1
        order = jnp.broadcast_to(jnp.arange(last.shape[1])[None], last.shape)
        chunks = cls(last, jnp.full_like(last, every), first, order)
        if added is None:
            return chunks
        begin, end = position[:, :1], position[:, :1] + added[:, None]
        length = end % every
        more = cls(added[:, None] - 1, length, end - length, end // every - begin // every)
        return cls(*(jnp.concatenate(pair, axis=1) for pair in zip(chunks, more, strict=True)))


def gated_values(
    weights: Weights, x: Residual, position: Int[Array, "batch token"], every: int
) -> tuple[
    Float[Array, "batch token *series head_dim"], Float[Array, "batch token *series head_dim"]
]:
    """Return the value of each token and the logit of its weight, per channel; float32."""
    value = project(x, weights["value"], out=jnp.dtype("float32"))
    logit = project(x, weights["gate"], out=jnp.dtype("float32"))
    bias = jnp.take(weights["bias"].astype(jnp.float32), position % every, axis=0)
    return value, logit + bias


def compressed(
    value: Float[Array, "batch token head_dim"],
    logit: Float[Array, "batch token head_dim"],
    chunks: ChunkPlaces,
    every: int,
    earlier: Running | None,
) -> Running:
    """Compute the softmax sums of each chunk. earlier: those of the chunk that was unfinished
    before; None for no such chunk.
    """
    made = running(value, logit, chunks.last, chunks.length, min(every, value.shape[1]))
    return made if earlier is None else made.after(earlier, chunks.order == 0)


def overlapping(
    value: Float[Array, "batch token 2 head_dim"],
    logit: Float[Array, "batch token 2 head_dim"],
    chunks: ChunkPlaces,
    every: int,
    earlier: tuple[Running, Running] | None,
) -> tuple[Running, Running]:
    """Compute the softmax sums of each entry over the first series of the tokens of the chunk
    before and the second series of its own tokens.

    earlier: before these tokens, the sums of the unfinished entry and those of the first series of
        its chunk, which the next entry needs; None for none

    Returns the sums of the entries, and those of the first series of the last chunk.
    """
    most = min(every, value.shape[1])
    own = running(value[:, :, 1], logit[:, :, 1], chunks.last, chunks.length, most)
    before = jnp.where(chunks.first >= every, every, 0)
    first = value[:, :, 0], logit[:, :, 0]
    entry = own.plus(running(*first, chunks.last - chunks.length, before, most))
    coming = running(*first, chunks.last[:, -1:], chunks.length[:, -1:], most)
    if earlier is not None:
        now, following = earlier
        entry = entry.after(now, chunks.order == 0).after(following, chunks.order == 1)
        coming = coming.after(following, chunks.order[:, -1:] == 0)
    return entry, coming


class Running(NamedTuple):
    """Running sums of a softmax over tokens, per channel, to which later tokens can be added.

    top: largest logit
    total: sum of exp(logit - top)
    weighted: sum of exp(logit - top) times the values

    All are zero before the first token.
    """

    top: Float[Array, "*place head_dim"]
    total: Float[Array, "*place head_dim"]
    weighted: Float[Array, "*place head_dim"]

    def after(self, earlier: Running, which: Bool[Array, "batch place"]) -> Running:
        """Add the sums of earlier tokens to the sums at some places.

        earlier: one set of sums per row, without the axis of places
        which: places that the earlier tokens belong to
        """
        return self.plus(
            Running(*(jnp.where(which[..., None], sums[:, None], 0.0) for sums in earlier))
        )

    def plus(self, other: Running) -> Running:
        """Add the sums of other tokens, place by place."""
        old = jnp.where(other.total > 0, other.top, -jnp.inf)
        new = jnp.where(self.total > 0, self.top, -jnp.inf)
        top = _finite(jax.lax.stop_gradient(jnp.maximum(old, new)))
        old, new = jnp.exp(old - top), jnp.exp(new - top)
        return Running(
            top,
            old * other.total + new * self.total,
            old * other.weighted + new * self.weighted,
        )

    def mean(self) -> Float[Array, "*place head_dim"]:
        """Return the mean of the values under the softmax; zeros where there is no token."""
        return self.weighted / jnp.where(self.total > 0, self.total, 1.0)

    def newest(self) -> Tensors:
        """Return the sums of the last place by name, as a state keeps them."""
        return {name: sums[:, -1] for name, sums in self._asdict().items()}


def running(
    value: Float[Array, "batch token head_dim"],
    logit: Float[Array, "batch token head_dim"],
    last: Int[Array, "batch place"],
    length: Int[Array, "batch place"],
    most: int,
) -> Running:
    """Compute the running softmax sums over the `length` tokens up to index `last`.

    Tokens before the start of the row are left out. most: upper bound of `length`. The tokens are
    gathered and not scattered, so that the gradient is deterministic.
    """
    back = jnp.arange(most)[None, None]
    token = last[..., None] - back
    valid = (token >= 0) & (back < length[..., None])
    index = jnp.maximum(token, 0).reshape(len(last), -1, 1)

    def gathered(array: Array) -> Array:
        found = jnp.take_along_axis(array, index, axis=1)
        return found.reshape(*token.shape, array.shape[-1])

    masked = jnp.where(valid[..., None], gathered(logit), -jnp.inf)
    top = _finite(jax.lax.stop_gradient(jnp.max(masked, axis=2)))
    weight = jnp.exp(masked - top[:, :, None])
    return Running(top, jnp.sum(weight, axis=2), jnp.sum(weight * gathered(value), axis=2))


def _finite(top: Array) -> Array:
    """Replace -inf, the maximum of an empty set of logits, by 0."""
    return jnp.where(jnp.isfinite(top), top, 0.0)
