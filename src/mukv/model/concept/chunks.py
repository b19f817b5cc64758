"""Rows of tokens as chunks: where each ends, what it is made of, which concept a token hears.

Everything is a gather over a static number of concepts. A row that goes on from a cache brings the
`State` that its last token left; one that begins brings zeros.
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
"""What became of each concept."""


# JAX also rebuilds a pytree with things that are no arrays: shapes can't be checked here.
@no_type_check
@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ChunkState:
    """What a row's last token leaves besides entries. mark: the chunker's. recent: what the encoder
    said of the tokens that an unfinished chunk may yet be made of. inside: tokens of that chunk.
    output: what the last concept became.
    """

    mark: Float[Array, "batch _"]
    recent: Float[Array, "batch _ embed"]
    inside: Int[Array, " batch"]
    output: Float[Array, "batch concept_embed"]


class Chunks(NamedTuple):
    """made: concepts of the document up to each token. number: of the row. inside: tokens of the
    chunk up to each token. end: place of each concept's last token; beyond the row where there is
    no such concept. total: concepts of each row.
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
        return self.number[:, -1]

    def at_ends(self, values: Array, fill: Any = 0) -> Array:
        """Of values per token [batch token ...] those at the ends of chunks [batch concept ...]."""
        return gathered(values, self.end, fill)

    def refused(self) -> Float[Array, " batch"]:
        """Borders that were wished for and not given."""
        return jnp.sum(self.wish.ends & ~self.ends, axis=1).astype(jnp.float32)


def gathered(values: Array, place: Int[Array, "batch _"], fill: Any = 0) -> Array:
    """values[row, place], and `fill` where a row has no such place."""

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
    """first, place: as `Chunker.wish` has them. real: not padding. start: concepts that each row's
    first document has already. concepts: room for those of a row."""
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
    nowhere = jnp.full((len(tokens), concepts), tokens.shape[1])
    places = jnp.broadcast_to(here, tokens.shape)
    end = nowhere.at[rows, slot].set(places, mode="drop")
    return Chunks(wish, ends, count, number, inside, end, mark)


def windows(
    chunks: Chunks, x: Residual, recent: Float[Array, "batch _ embed"]
) -> tuple[Window, Present]:
    """The tokens that each concept is made of, zeros where the chunk has no more."""
    behind = recent.shape[1]
    line = jnp.concatenate([recent.astype(x.dtype), x], axis=1)
    back = jnp.arange(behind, -1, -1)[None, None]
    # A concept that there isn't is made of one token, so that no reduction sees nothing.
    long = jnp.maximum(chunks.at_ends(chunks.inside), 1)
    present = back < long[..., None]
    place = jnp.where(present, chunks.end[..., None] + behind - back, line.shape[1])
    window = gathered(line, place.reshape(len(x), -1))
    return window.reshape(*place.shape, x.shape[-1]), present


def smoothed(
    outputs: ConceptOutputs,
    chance: Float[Array, "batch concept"],
    anew: Bool[Array, "batch concept"],
    before: Float[Array, "batch concept_embed"],
) -> ConceptOutputs:
    """A concept of an unsure border is mixed with the one before it (H-Net, equation 5).

    anew: the first of its document. before: the one before the row's first.
    """
    share = jnp.where(anew, 1.0, chance)[..., None].astype(outputs.dtype)

    def then(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
        return one[0] * two[0], one[1] * two[0] + two[1]

    keep, mixed = jax.lax.associative_scan(then, (1 - share, share * outputs), axis=1)
    return mixed + keep * before[:, None].astype(outputs.dtype)


def left(
    chunks: Chunks,
    x: Residual,
    outputs: ConceptOutputs,
    state: ChunkState,
    count: Int[Array, " batch"],
) -> ChunkState:
    """What the last of `count` tokens of each row leaves."""

    def last(values: Array, place: Array) -> Array:
        return jnp.take_along_axis(values, place[:, None, None], axis=1)[:, 0]

    behind = state.recent.shape[1]
    line = jnp.concatenate([state.recent.astype(x.dtype), x], axis=1)
    place = count[:, None] + jnp.arange(behind)[None]
    outputs_so_far = jnp.concatenate([state.output[:, None].astype(x.dtype), outputs], axis=1)
    ended = last(chunks.ends[..., None], count - 1)[:, 0]
    inside = last(chunks.inside[..., None], count - 1)[:, 0]
    return ChunkState(
        mark=last(chunks.mark, count - 1).astype(state.mark.dtype),
        recent=jnp.take_along_axis(line, place[..., None], axis=1).astype(state.recent.dtype),
        inside=jnp.where(ended, 0, inside),
        output=last(outputs_so_far, chunks.total).astype(state.output.dtype),
    )
