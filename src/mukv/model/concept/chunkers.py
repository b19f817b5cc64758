"""Chunkers: rules by which a chunk of tokens ends and becomes a concept.

A chunker proposes the ends of chunks. It decides about a token from that token and a vector of the
previous one, its `mark`, so that whole rows and single steps use one function. `paced` then limits
the number of concepts to n // room after n tokens of a document, so that a cache of static size
suffices. A proposed end beyond this limit is refused and counted, and its chunk continues.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.params import Param
from mukv.core.table import Component, PartTable
from mukv.core.typing import Array, Bool, Float, Int, Residual, Tokens, Weights

HUGE = 1 << 29
"""A number larger than any number of concepts."""


class Wish(NamedTuple):
    """Proposed ends of chunks.

    ends: whether the chunker proposes to end a chunk after this token
    chance: probability of an end, 0 to 1; None for a fixed rule
    """

    ends: Bool[Array, "batch token"]
    chance: Float[Array, "batch token"] | None = None


@dataclass(frozen=True)
class Chunker(Component):
    """Base class of chunkers; the fields are the YAML keys.

    room: minimum number of tokens per concept, averaged from the start of the document
    span: number of a chunk's last tokens that its concept is computed from
    """

    sizes: ClassVar[tuple[str, ...]] = ()
    """Fields that must be counts of at least 1."""

    def __post_init__(self) -> None:
        require_counts(self, *self.sizes, unit="token")

    @property
    def pace(self) -> int:
        """Minimum number of tokens per concept, averaged from the start of the document."""
        raise NotImplementedError

    @property
    def reach(self) -> int:
        """Number of a chunk's last tokens that its concept is computed from."""
        raise NotImplementedError

    def burst(self, tokens: int) -> int:
        """Return the maximum number of chunks that may end within this many consecutive tokens."""
        return tokens

    def check(self, vocab_size: int) -> None:
        """Raise BadInput for token ids that a vocabulary of this size lacks."""

    def params(self, d_model: int) -> dict[str, Param]:
        """Declare the weights."""
        return {}

    def mark(self, weights: Weights, tokens: Tokens, x: Residual) -> Float[Array, "batch token _"]:
        """Return the vector of each token from which `wish` decides about the next token."""
        return jnp.zeros((*tokens.shape, 0), x.dtype)

    def mark_width(self, d_model: int) -> int:
        """Return the width of a mark."""
        return 0

    def wish(
        self,
        weights: Weights,
        x: Residual,
        mark: Float[Array, "batch token _"],
        before: Float[Array, "batch token _"],
        first: Bool[Array, "batch token"],
        place: Int[Array, "batch token"],
    ) -> Wish:
        """Propose the ends of chunks.

        x: output of the encoder for each token
        mark, before: marks of each token and of the previous token
        first: whether the token is the first one of its document
        place: place of the token in its document, from 0
        """
        raise NotImplementedError

    def penalty(
        self, ends: Bool[Array, "batch token"], wish: Wish
    ) -> Float[Array, " batch"] | None:
        """Return the penalty that training adds to the cross-entropy, in nats per token of each
        row; None for none.
        """
        return None


@dataclass(frozen=True)
class Fixed(Chunker):
    """Chunks of equal length.

    size: tokens per chunk
    """

    kind: Literal["fixed"] = "fixed"
    size: int = 4

    sizes: ClassVar[tuple[str, ...]] = ("size",)

    @property
    def pace(self) -> int:
        return self.size

    @property
    def reach(self) -> int:
        return self.size

    def burst(self, tokens: int) -> int:
        return -(-tokens // self.size)

    def wish(self, weights: Any, x: Any, mark: Any, before: Any, first: Any, place: Any) -> Wish:
        return Wish((place + 1) % self.size == 0)


def _ascii_delimiters() -> tuple[int, ...]:
    """Return the ASCII bytes that are neither letters nor digits."""
    return tuple(byte for byte in range(128) if not chr(byte).isalnum())


@dataclass(frozen=True)
class Delimiter(Chunker):
    """A chunk ends at a delimiter that does not follow another delimiter (SpaceByte, Slagle 2024).

    delimiters: token ids of delimiters; by default all bytes of ASCII that are neither letters nor
        digits
    room: minimum number of tokens per concept, averaged from the start of the document
    span: number of a chunk's last tokens that its concept is computed from

    A run of delimiters therefore ends one chunk at its first delimiter; the others belong to the
    next chunk.
    """

    kind: Literal["delimiter"] = "delimiter"
    delimiters: tuple[int, ...] = _ascii_delimiters()
    room: int = 4
    span: int = 8

    sizes: ClassVar[tuple[str, ...]] = ("room", "span")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.delimiters or min(self.delimiters) < 0:
            raise BadInput("delimiters", list(self.delimiters), "at least one token id, from 0 on")

    @property
    def pace(self) -> int:
        return self.room

    @property
    def reach(self) -> int:
        return self.span

    def burst(self, tokens: int) -> int:
        return -(-tokens // 2)

    def check(self, vocab_size: int) -> None:
        if max(self.delimiters) >= vocab_size:
            allowed = f"token ids go from 0 to {vocab_size - 1}"
            raise BadInput("chunker.delimiters", max(self.delimiters), allowed)

    def mark(self, weights: Weights, tokens: Tokens, x: Residual) -> Float[Array, "batch token 1"]:
        return jnp.isin(tokens, jnp.asarray(self.delimiters))[..., None].astype(x.dtype)

    def mark_width(self, d_model: int) -> int:
        return 1

    def wish(self, weights: Any, x: Any, mark: Any, before: Any, first: Any, place: Any) -> Wish:
        follows = (before[..., 0] > 0) & ~first
        return Wish((mark[..., 0] > 0) & ~follows)


@dataclass(frozen=True)
class Learned(Chunker):
    """A chunk ends where neighbouring tokens are dissimilar (H-Net, Hwang et al. 2025, equation 4).

    ratio: tokens per concept that the ratio loss trains towards
    weight: weight of the ratio loss (equation 10)
    room: minimum number of tokens per concept, averaged from the start of the document
    span: number of a chunk's last tokens that its concept is computed from

    The probability of an end is (1 - cos(query of this token, key of the one before)) / 2; an end
    is proposed above 1/2.
    """

    kind: Literal["learned"] = "learned"
    ratio: float = 6.0
    weight: float = 0.03
    room: int = 4
    span: int = 8

    sizes: ClassVar[tuple[str, ...]] = ("room", "span")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio <= 1:
            raise BadInput("ratio", self.ratio, "more than 1 token per concept")
        if self.ratio < self.room:
            allowed = f"at least room ({self.room}), the minimum number of tokens per concept"
            raise BadInput("ratio", self.ratio, allowed)
        if self.weight < 0:
            raise BadInput("weight", self.weight, "at least 0")

    @property
    def pace(self) -> int:
        return self.room

    @property
    def reach(self) -> int:
        return self.span

    def params(self, d_model: int) -> dict[str, Param]:
        # The projections are the identity plus these weights, which start at zero.
        square = Param({"embed": d_model, "turned": d_model}, fan_in=("embed",), init="zeros")
        return {"now": square, "before": square}

    def mark(self, weights: Weights, tokens: Tokens, x: Residual) -> Residual:
        return _unit(x + project(x, weights["before"]))

    def mark_width(self, d_model: int) -> int:
        return d_model

    def wish(
        self,
        weights: Weights,
        x: Residual,
        mark: Residual,
        before: Residual,
        first: Bool[Array, "batch token"],
        place: Int[Array, "batch token"],
    ) -> Wish:
        query = _unit(x + project(x, weights["now"]))
        likeness = jnp.sum((query * before).astype(jnp.float32), axis=-1)
        chance = jnp.where(first, 1.0, (1 - likeness) / 2)
        return Wish(chance > 0.5, chance)

    def penalty(self, ends: Bool[Array, "batch token"], wish: Wish) -> Float[Array, " batch"]:
        assert wish.chance is not None
        made, chance = jnp.mean(ends * 1.0, axis=1), jnp.mean(wish.chance, axis=1)
        balance = (self.ratio - 1) * made * chance + (1 - made) * (1 - chance)
        return self.weight * self.ratio / (self.ratio - 1) * balance


def _unit(x: Residual) -> Residual:
    """Divide by the Euclidean norm over the last axis, in float32; the type of x is kept."""
    wide = x.astype(jnp.float32)
    square = jnp.sum(wide**2, axis=-1, keepdims=True)
    return (wide * jax.lax.rsqrt(square + 1e-12)).astype(x.dtype)


def paced(
    wish: Bool[Array, "batch token"],
    first: Bool[Array, "batch token"],
    place: Int[Array, "batch token"],
    start: Int[Array, " batch"],
    room: int,
) -> Int[Array, "batch token"]:
    """Count the concepts of each document up to each of its tokens.

    wish: proposed ends
    first: whether the token is the first one of its document
    place: place of the token in its document, from 0
    start: number of concepts that the row's first document had before these tokens
    room: tokens per concept; at place p there are at most (p + 1) // room concepts

    Each token maps a count c to min(c + wish, limit). Such functions are closed under composition,
    so the counts are computed by an associative scan.
    """
    limit = (place + 1) // room
    more = wish.astype(jnp.int32)

    def compose(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.minimum(one[0] + two[0], HUGE), jnp.minimum(one[1] + two[0], two[1])

    steps = jnp.where(first, HUGE, more)
    limits = jnp.where(first, jnp.minimum(more, limit), limit)
    steps, limits = jax.lax.associative_scan(compose, (steps, limits), axis=1)
    return jnp.minimum(start[:, None] + steps, limits)


CHUNKERS = PartTable(
    "chunker", Chunker, {"fixed": Fixed, "delimiter": Delimiter, "learned": Learned}
)
AnyChunker = Annotated[Chunker, CHUNKERS]
