"""Division of rows of tokens into chunks: ends, members, and the concept that each token reads.

All operations are gathers with a static number of concepts per row. A row that continues from a
cache starts from the `ChunkState` after its last token; a new row starts from zeros.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, no_type_check

import jax
import jax.numpy as jnp

from mukv.core.typing import Array, Bool, Float, Int, Residual, Tokens, Weights
from mukv.model.concept.chunkers import Chunker, Wish, paced
from mukv.model.concept.pooling import Present, Window

ConceptOutputs = Float[Array, "batch concept concept_embed"]
"""Outputs of the global layers."""


# JAX also rebuilds pytrees with leaves that are not arrays, so shapes can't be checked here.
@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkState:
    """State of decoding besides the entries, for each row after its last token.

    mark: the chunker's mark of that token
    recent: encoder outputs of the last tokens, from which the unfinished chunk may be pooled
    inside: number of tokens in the unfinished chunk
    output: output of the global layers for the latest concept
    """

    mark: Float[Array, "batch _"]
    recent: Float[Array, "batch _ embed"]
    inside: Int[Array, " batch"]
    output: Float[Array, "batch concept_embed"]


class Chunks(NamedTuple):
    """Chunks of rows of tokens.

    wish: ends that the chunker proposes
    ends: whether a chunk ends after each token
    made: number of concepts of the document up to each token
    number: number of concepts of the row up to each token
    inside: number of tokens of the chunk up to each token
    end: index of each concept's last token; the row's length where there is no such concept
    mark: the chunker's mark of each token
    """

    wish: Wish
    ends: Bool[Array, "batch token"]
    made: Int[Array, "batch token"]
    number: Int[Array, "batch token"]
    inside: Int[Array, "batch token"]
    end: Int[Array, "batch concept"]
    mark: Float[Array, "batch token _"]

    @property
    def total(self) -> Int[Array, " batch"]:
        """Number of concepts of each row."""
        return self.number[:, -1]

    def at_ends(self, values: Array, fill: Any = 0) -> Array:
        """Gather values per token [batch token ...] at the ends of chunks: [batch concept ...]."""
        return gathered(values, self.end, fill)

    def refused(self) -> Float[Array, " batch"]:
        """Count the proposed ends of each row that were refused."""
        return jnp.sum(self.wish.ends & ~self.ends, axis=1).astype(jnp.float32)


def gathered(values: Array, place: Int[Array, "batch _"], fill: Any = 0) -> Array:
    """Return values[row, place], and `fill` where `place` is beyond the row."""

    def row(values: Array, place: Array) -> Array:
        return values.at[place].get(mode="fill", fill_value=fill)

    return jax.vmap(row)(values, place)


def chunked(
    chunker: Chunker,
    weights: Weights,
    tokens: Tokens,
    x: Residual,
    first: Bool[Array, "batch token"],
    place: Int[Array, "batch token"],
    real: Bool[Array, "batch token"],
    state: ChunkState,
    start: Int[Array, " batch"],
    concepts: int,
) -> Chunks:
    """Divide rows of tokens into chunks.

    x: encoder outputs
    first, place: as in `Chunker.wish`
    real: which tokens are not padding
    state: state after the tokens before these
    start: number of concepts that the first document of each row has before these tokens
    concepts: maximum number of concepts per row
    """
    mark = chunker.mark(weights, tokens, x)
    before = jnp.concatenate([state.mark[:, None].astype(mark.dtype), mark[:, :-1]], axis=1)
    wish = chunker.wish(weights, x, mark, before, first, place)
    wish = wish._replace(ends=wish.ends & real)
    count = paced(wish.ends, first, place, start, chunker.pace)
    previous = jnp.concatenate([start[:, None], count[:, :-1]], axis=1)
    ends = count > jnp.where(first, 0, previous)
    number = jnp.cumsum(ends, axis=1)

    here = jnp.arange(tokens.shape[1])[None]
    opens = first | jnp.pad(ends[:, :-1], ((0, 0), (1, 0)))
    opened = jnp.where(opens, here, -state.inside[:, None])
    inside = here - jax.lax.cummax(opened, axis=1) + 1

    rows, slot = jnp.arange(len(tokens))[:, None], jnp.where(ends, number - 1, concepts)
    no_concept = jnp.full((len(tokens), concepts), tokens.shape[1])
    places = jnp.broadcast_to(here, tokens.shape)
    end = no_concept.at[rows, slot].set(places, mode="drop")
    return Chunks(wish, ends, count, number, inside, end, mark)


def windows(
    chunks: Chunks, x: Residual, recent: Float[Array, "batch _ embed"]
) -> tuple[Window, Present]:
    """Gather the tokens that each concept is pooled from, with zeros where a chunk has fewer.

    recent: encoder outputs of the tokens before the row
    """
    behind = recent.shape[1]
    extended = jnp.concatenate([recent.astype(x.dtype), x], axis=1)
    back = jnp.arange(behind, -1, -1)[None, None]
    # A missing concept is given one token, so that pooling never reduces an empty set.
    long = jnp.maximum(chunks.at_ends(chunks.inside), 1)
    present = back < long[..., None]
    place = jnp.where(present, chunks.end[..., None] + behind - back, extended.shape[1])
    window = gathered(extended, place.reshape(len(x), -1))
    return window.reshape(*place.shape, x.shape[-1]), present


def smoothed(
    outputs: ConceptOutputs,
    chance: Float[Array, "batch concept"],
    anew: Bool[Array, "batch concept"],
    before: Float[Array, "batch concept_embed"],
) -> ConceptOutputs:
    """Mix each concept with the previous one if its end is uncertain (H-Net, equation 5).

    chance: probability of the end of each concept's chunk
    anew: whether the concept is the first one of its document
    before: output of the concept before the row's first one
    """
    share = jnp.where(anew, 1.0, chance)[..., None].astype(outputs.dtype)

    def compose(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
        return one[0] * two[0], one[1] * two[0] + two[1]

    keep, mixed = jax.lax.associative_scan(compose, (1 - share, share * outputs), axis=1)
    return mixed + keep * before[:, None].astype(outputs.dtype)


def state_after(
    chunks: Chunks,
    x: Residual,
    outputs: ConceptOutputs,
    state: ChunkState,
    count: Int[Array, " batch"],
) -> ChunkState:
    """Return the chunk state after the last of `count` tokens of each row."""

    def last(values: Array, place: Array) -> Array:
        return jnp.take_along_axis(values, place[:, None, None], axis=1)[:, 0]

    behind = state.recent.shape[1]
    extended = jnp.concatenate([state.recent.astype(x.dtype), x], axis=1)
    place = count[:, None] + jnp.arange(behind)[None]
    outputs_so_far = jnp.concatenate([state.output[:, None].astype(x.dtype), outputs], axis=1)
    ended = last(chunks.ends[..., None], count - 1)[:, 0]
    inside = last(chunks.inside[..., None], count - 1)[:, 0]
    return ChunkState(
        mark=last(chunks.mark, count - 1).astype(state.mark.dtype),
        recent=jnp.take_along_axis(extended, place[..., None], axis=1).astype(state.recent.dtype),
        inside=jnp.where(ended, 0, inside),
        output=last(outputs_so_far, chunks.total).astype(state.output.dtype),
    )
