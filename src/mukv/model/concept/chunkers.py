"""Where a chunk of tokens ends and becomes a concept.

A chunker says where chunks want to end; what it needs to know of the token before is its `mark`,
so that rows and single steps ask the same question. `paced` then lets a document of n tokens have
n // room concepts at most, wherever it stands: memory of static size is never overrun, a border
that comes too early is refused and counted, and its chunk goes on.
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
from mukv.core.table import Part, Table
from mukv.core.typing import Array, Bool, Float, Int, Residual, Tokens, Weights

HUGE = 1 << 29
"""More than any number of concepts."""


class Wish(NamedTuple):
    """ends: where chunks want to end. chance: how sure of it, 0 to 1; None where it is a rule."""

    ends: Bool[Array, "batch token"]
    chance: Float[Array, "batch token"] | None = None


@dataclass(frozen=True)
class Chunker(Part):
    """The contract; fields are the YAML keys. room: tokens for which there is one concept. span:
    tokens of a chunk, from its end backwards, that a concept is made of."""

    sizes: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        require_counts(self, *self.sizes, unit="token")

    @property
    def pace(self) -> int:
        """Tokens for which there is one concept."""
        raise NotImplementedError

    @property
    def reach(self) -> int:
        """Tokens of a chunk, from its end backwards, that a concept is made of."""
        raise NotImplementedError

    def burst(self, tokens: int) -> int:
        """Chunks that may end within so many tokens, wherever in a document."""
        return tokens

    def check(self, vocab_size: int) -> None:
        """Raise BadInput for what a vocabulary of this size lacks."""

    def params(self, d_model: int) -> dict[str, Param]:
        return {}

    def mark(self, weights: Weights, tokens: Tokens, x: Residual) -> Float[Array, "batch token _"]:
        """What the token after each must know of it."""
        return jnp.zeros((*tokens.shape, 0), x.dtype)

    def mark_width(self, d_model: int) -> int:
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
        """x: what the encoder says. mark, before: of each token and the one before it. first: of
        its document. place: in its document, from 0."""
        raise NotImplementedError

    def penalty(
        self, ends: Bool[Array, "batch token"], wish: Wish
    ) -> Float[Array, " batch"] | None:
        """Nats per token of each row that training minimises besides."""
        return None


@dataclass(frozen=True)
class Fixed(Chunker):
    """Chunks of equal length. size: tokens of a chunk."""

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


def _spacelike() -> tuple[int, ...]:
    """Bytes that are no letter, no digit and no part of a character beyond ASCII."""
    return tuple(byte for byte in range(128) if not chr(byte).isalnum())


@dataclass(frozen=True)
class Delimiter(Chunker):
    """A chunk ends at a delimiter that follows none (SpaceByte, Slagle 2024): of a run of them the
    first, so that the next chunk has the others. delimiters: token ids; by default all bytes of
    ASCII that are neither letters nor digits. room, span: as `Chunker` says.
    """

    kind: Literal["delimiter"] = "delimiter"
    delimiters: tuple[int, ...] = _spacelike()
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
    """A chunk ends where neighbours are unlike: chance = (1 - cos(query of this token, key of the
    one before)) / 2 above a half (H-Net, Hwang et al. 2025, equation 4). ratio: tokens per concept
    that training is drawn towards. weight: of that loss (equation 10). room, span: as `Chunker`
    says.
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
            allowed = f"at least room ({self.room}): there is no place for more concepts"
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
        # Both begin as the identity, to which these are added.
        turn = Param({"embed": d_model, "turned": d_model}, fan_in=("embed",), init="zeros")
        return {"now": turn, "before": turn}

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
        both = (self.ratio - 1) * made * chance + (1 - made) * (1 - chance)
        return self.weight * self.ratio / (self.ratio - 1) * both


def _unit(x: Residual) -> Residual:
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
    """Concepts of a document up to each of its tokens: as many as wished, but at place p never
    more than (p + 1) // room. start: those that the row's first document had before.

    One token takes a count c to min(c + wish, limit), and such functions compose to one of their
    kind: a parallel scan.
    """
    limit = (place + 1) // room
    more = wish.astype(jnp.int32)

    def then(one: tuple[Array, Array], two: tuple[Array, Array]) -> tuple[Array, Array]:
        return jnp.minimum(one[0] + two[0], HUGE), jnp.minimum(one[1] + two[0], two[1])

    steps = jnp.where(first, HUGE, more)
    limits = jnp.where(first, jnp.minimum(more, limit), limit)
    steps, limits = jax.lax.associative_scan(then, (steps, limits), axis=1)
    return jnp.minimum(start[:, None] + steps, limits)


CHUNKERS = Table("chunker", Chunker, {"fixed": Fixed, "delimiter": Delimiter, "learned": Learned})
AnyChunker = Annotated[Chunker, CHUNKERS]
