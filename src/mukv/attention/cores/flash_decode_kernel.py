"""FlashDecoding as a Pallas kernel that Triton compiles; see `flash_decode`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from mukv.attention.stored import BlockDecoder
from mukv.core.typing import Array


class BagArrays(NamedTuple):
    """Arrays of one bag, or the kernel's references to those of one head.

    position: position of each place, int32 [batch heads place], negative for an empty one; None if
        there is a mask
    mask: whether the query sees each place that is read, int8 [batch heads place]; None if that
        follows from the positions
    runs: runs of slots that are read, int32 [batch heads run]; None for all slots
    tensors: for each tensor, its arrays [batch heads row width] by part
    """

    position: Any
    mask: Any
    runs: Any
    tensors: tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class BagBlocks:
    """Division of a bag into blocks of places.

    slots, places: number of slots, and of those that are read
    run: slots of a run; None where all slots are read
    block: places per block, a power of two
    decoders: of each tensor
    keys, value: which tensors are the pieces of the keys, and which are the values
    window: tokens that the query sees, of a bag with positions; None for all
    """

    slots: int
    places: int
    run: int | None
    block: int
    decoders: tuple[BlockDecoder, ...]
    keys: tuple[int, ...]
    value: int
    window: int | None

    @property
    def number(self) -> int:
        """Number of blocks."""
        return -(-self.places // self.block)

    @property
    def ragged(self) -> bool:
        """Whether the last block is shorter than the others."""
        return self.places % self.block > 0

    def visible(self, bag: BagArrays, at: Array, j: Array) -> Array:
        """Return whether the query sees each place of block j. at: position of the query"""
        rows = j * self.block, self.block
        if bag.position is not None:
            place = self._rows(bag.position, *rows)
            seen = (place >= 0) & (place <= at)
            if self.window is not None:
                seen &= at - place < self.window
        else:
            seen = self._rows(bag.mask, *rows) != 0
        if self.ragged:
            seen &= j * self.block + _count(self.block) < self.places
        return seen

    def tensors(self, bag: BagArrays, j: Array) -> list[Array]:
        """Return the decoded tensors [place width] of block j."""
        return [
            decode({name: self._part(bag, ref, j) for name, ref in parts.items()}, self.block)
            for decode, parts in zip(self.decoders, bag.tensors, strict=True)
        ]

    def _part(self, bag: BagArrays, ref: Any, j: Array) -> Array:
        """Return the rows of a part that belong to block j."""
        per = self.slots // ref.shape[0]
        if self.run is None:
            return self._rows(ref, j * self.block // per, max(self.block // per, 1))
        runs = max(self.block // self.run, 1)
        chosen = self._rows(bag.runs, j * self.block // self.run, runs)
        many = max(self.run // per, 1)
        row = (chosen * self.run // per)[:, None] + _count(many)[None]
        return ref[row.reshape(-1)]

    def _rows(self, ref: Any, start: Array, number: int) -> Array:
        """Return some rows, the last one again where the block is longer than what is left."""
        if not self.ragged:
            return ref[pl.ds(start, number)]
        return ref[jnp.minimum(start + _count(number), ref.shape[0] - 1)]


@dataclass(frozen=True)
class Kernel:
    """The kernel of one shape.

    bags: division of each bag
    tree: structure of its arguments: the pieces of the queries, their positions, and the bags
    rows: query heads per head, padded
    width: of a value
    softcap: as in `Scores`
    """

    bags: tuple[BagBlocks, ...]
    tree: Any
    rows: int
    width: int
    softcap: float | None
    interpret: bool

    def step(self, splits: int, *refs: Any) -> None:
        """Write the softmax of the query heads of one head over one of the `splits`: the sum of
        values, the largest logit, and the sum of weights relative to it."""
        *given, mixed, top, total = refs
        pieces, position, bags = self.tree.unflatten(given)
        query, at, split = [piece[...] for piece in pieces], position[0], pl.program_id(0)
        state = (
            jnp.full(self.rows, -jnp.inf, jnp.float32),
            jnp.zeros(self.rows, jnp.float32),
            jnp.zeros((self.rows, self.width), jnp.float32),
        )
        for cut, bag in zip(self.bags, bags, strict=True):
            each = -(-cut.number // splits)
            start = jnp.minimum(split * each, cut.number)
            stop = jnp.minimum(start + each, cut.number)
            state = jax.lax.fori_loop(start, stop, partial(self._visit, cut, bag, query, at), state)
        top[...], total[...], mixed[...] = state

    def _visit(
        self,
        cut: BagBlocks,
        bag: BagArrays,
        query: list[Array],
        at: Array,
        j: Array,
        state: Any,
    ) -> Any:
        """Add block j of a bag to the online softmax."""
        top, total, mixed = state
        tensors, kind = cut.tensors(bag, j), query[0].dtype
        products = jnp.zeros((self.rows, cut.block), jnp.float32)
        for asked, place in zip(query, cut.keys, strict=True):
            products += _product(asked, tensors[place].astype(kind).T)
        if self.softcap is not None:
            products = self.softcap * jnp.tanh(products / self.softcap)
        masked = jnp.where(cut.visible(bag, at, j)[None], products, -jnp.inf)
        higher = jnp.maximum(top, jnp.max(masked, axis=1))
        safe = jnp.where(higher == -jnp.inf, 0.0, higher)
        weights, shrink = jnp.exp(masked - safe[:, None]), jnp.exp(top - safe)
        mixed = mixed * shrink[:, None]
        mixed += _product(weights.astype(kind), tensors[cut.value].astype(kind))
        return higher, total * shrink + jnp.sum(weights, axis=1), mixed

    def call(self, arrays: Sequence[Array], programs: int) -> tuple[Array, ...]:
        """Run the kernel once per split, head and row of the batch.

        arrays: leaves of `tree`
        programs: number of programs to divide the work into

        Returns [batch heads split row width], and twice [batch heads split row]; float32.
        """
        batch, heads = arrays[0].shape[:2]
        most = max(cut.number for cut in self.bags)
        each = -(-most // min(most, max(1, programs // (batch * heads))))
        splits = -(-most // each)

        def whole(array: Array) -> Any:
            own, rest = array.shape[1], array.shape[2:]
            return pl.BlockSpec(
                (None, None, *rest), lambda s, h, b: (b, h * own // heads, *(0,) * len(rest))
            )

        def piece(*rest: int) -> tuple[Any, Any]:
            spec = pl.BlockSpec(
                (None, None, None, *rest), lambda s, h, b: (b, h, s, *(0,) * len(rest))
            )
            return jax.ShapeDtypeStruct((batch, heads, splits, *rest), jnp.float32), spec

        made = piece(self.rows, self.width), piece(self.rows), piece(self.rows)
        return pl.pallas_call(
            partial(self.step, splits),
            grid=(splits, heads, batch),
            in_specs=list(map(whole, arrays)),
            out_specs=[spec for _, spec in made],
            out_shape=[shape for shape, _ in made],
            compiler_params=triton.CompilerParams(num_warps=4, num_stages=2),
            interpret=self.interpret,
            name="flash_decode",
        )(*arrays)


def _count(number: int) -> Array:
    """Return 0 to number - 1."""
    return jax.lax.iota(jnp.int32, number)


def _product(x: Array, y: Array) -> Array:
    """Multiply two matrices with float32 sums."""
    return jnp.dot(x, y, preferred_element_type=jnp.float32)
