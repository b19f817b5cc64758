"""Weights stored in few bits (int8, int4, bfloat16), dequantised block by block in each product.

A matrix is stored as codes [output group code]: the inputs of each output are divided into groups
that share a step. int8 has groups of 64 inputs and is symmetric, w = step * code. int4 has groups
of 32 inputs between minimum and maximum, w = low + step * code, and packs two codes into a byte.
Steps and minima are bfloat16, rounded so that every weight lies within the levels; the error of a
weight is therefore at most half a step. Compact weights have no gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from mukv.core.errors import unknown_name
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Number

GROUPS: Mapping[str, int | None] = {"int8": 64, "int4": 32, "bfloat16": None}
"""Number of inputs that share a step, by format; None for a format without steps."""
LEVELS: Mapping[str, int] = {"int8": 127, "int4": 15}
"""Largest code of each format that has steps."""
FEW = 16
"""Largest number of rows of activations for which a product dequantises in small blocks. Decoding
has few rows, prefill many."""
BLOCKS: Mapping[bool, int] = {True: 1 << 16, False: 1 << 22}
"""Codes per block, for few rows (True) and for many. With few rows a block takes 256 KiB as
float32: it stays in the processor's second-level cache, and XLA uses one thread for it; larger
blocks, which XLA divides among threads, take 1.3 times as long on two cores. With many rows a block
takes 16 MiB, so that a readout is never dequantised as a whole."""


def require_format(kind: str, where: str = "weights") -> None:
    """Raise BadInput for an unknown format."""
    if kind not in GROUPS:
        raise unknown_name(where, kind, GROUPS)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Compact:
    """A weight stored in few bits.

    codes: int8, uint8 (two codes of 4 bits), or uint16 (the bits of bfloat16)
    step, low: bfloat16 factor and minimum of each group; None where the format has none
    inputs, outputs: sizes of the contracted axes and of the others
    kind: name of the format
    turned: whether the declared axes are [*leading *outputs *inputs], as those of an embedding,
        and not [*leading *inputs *outputs]
    dtype: type that the weight is dequantised to

    `core.linear` multiplies with it block by block and looks up rows. Other JAX functions, such as
    `einsum`, call `__jax_array__`, which dequantises the whole weight.
    """

    codes: Int[Array, "*leading output group code"]
    step: Float[Array, "*leading output group"] | None
    low: Float[Array, "*leading output group"] | None
    inputs: tuple[int, ...] = field(metadata={"static": True})
    outputs: tuple[int, ...] = field(metadata={"static": True})
    kind: str = field(metadata={"static": True})
    turned: bool = field(default=False, metadata={"static": True})
    dtype: jnp.dtype = field(default=jnp.dtype("float32"), metadata={"static": True})

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the axes that count separate matrices, such as experts."""
        return self.codes.shape[:-3]

    @property
    def shape(self) -> tuple[int, ...]:
        own = (*self.outputs, *self.inputs) if self.turned else (*self.inputs, *self.outputs)
        return (*self.leading, *own)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def T(self) -> Compact:
        """The transposed matrix, with the same arrays."""
        return replace(self, turned=not self.turned)

    def astype(self, dtype: DTypeLike) -> Compact:
        """Change the type that the weight is dequantised to."""
        return replace(self, dtype=jnp.dtype(dtype))

    def __mul__(self, factor: Number) -> Compact:
        """Multiply the weight by a number; the steps and minima of the result are float32."""
        if self.step is None:
            return replace(self, step=jnp.full(self.codes.shape[:-1], factor, jnp.float32))
        step = self.step.astype(jnp.float32) * factor
        low = None if self.low is None else self.low.astype(jnp.float32) * factor
        return replace(self, step=step, low=low)

    def __getitem__(self, index: Int[Array, "..."]) -> Compact:
        """Return the matrices at these indices of the first leading axis, such as experts."""
        assert self.leading, "a single matrix has no axis of matrices"
        return self._mapped(lambda array: array[index])

    def whole(self) -> Array:
        """Dequantise the whole weight to an array of the declared shape."""
        matrices = self._decoded()
        return (matrices if self.turned else jnp.swapaxes(matrices, -1, -2)).reshape(self.shape)

    __jax_array__ = whole

    def rows(self, index: Int[Array, "..."]) -> Float[Array, "... input"]:
        """Look up rows of an embedding, whose vocabulary is the axis of outputs."""
        taken = self._mapped(partial(jnp.take, indices=index, axis=0))
        return taken._decoded()

    def product(self, x: Float[Array, "row input"]) -> Float[Array, "row output"]:
        """Multiply rows with the matrix: operands of the type `dtype`, float32 sums and result.

        On a CPU blocks of outputs are dequantised and multiplied one after the other, so that only
        one dequantised block exists at a time.
        """
        halves = self._split(x.astype(self.dtype))
        # Chosen when the program is lowered, by the platform that it is lowered for.
        return jax.lax.platform_dependent(
            self, halves, cpu=Compact._in_blocks, default=Compact._at_once
        )

    def _at_once(self, halves: Sequence[Array]) -> Float[Array, "row output"]:
        # The left operand is the matrix, because XLA's CPU product is slow if its left operand has
        # few rows or its right one is transposed.
        terms = [
            jnp.matmul(piece, x.T, preferred_element_type=jnp.float32)
            for x, piece in zip(halves, self._pieces(), strict=True)
        ]
        return (terms[0] if len(terms) == 1 else terms[0] + terms[1]).T

    def _in_blocks(self, halves: Sequence[Array]) -> Float[Array, "row output"]:
        count, rows = self.codes.shape[-3], len(halves[0])
        size = max(1, BLOCKS[rows <= FEW] // math.prod(self.codes.shape[-2:]))
        if size >= count:
            return self._at_once(halves)

        def put(number: Array, out: Array) -> Array:
            # The last block begins earlier, so that it is as large as the others.
            start = jnp.minimum(number * size, count - size)
            part = self._part(start, size)._at_once(halves)
            return jax.lax.dynamic_update_slice(out, part.T, (start, 0))

        empty = jnp.zeros((count, rows), jnp.float32)
        return jax.lax.fori_loop(0, -(-count // size), put, empty).T

    # Parts

    @property
    def _width(self) -> int:
        """Number of inputs, padding included."""
        packed = 2 if self.kind == "int4" else 1
        return packed * math.prod(self.codes.shape[-2:])

    def _mapped(self, function: Callable[[Array], Array]) -> Compact:
        """Apply a function to each array."""
        step, low = (None if a is None else function(a) for a in (self.step, self.low))
        return replace(self, codes=function(self.codes), step=step, low=low)

    def _part(self, start: Array, size: int) -> Compact:
        """Return `size` outputs from `start` of a single matrix."""
        return self._mapped(
            partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        )

    def _split(self, x: Float[Array, "row input"]) -> list[Float[Array, "row code"]]:
        """Pad the inputs to whole groups. For int4, divide them into those whose codes are in the
        low and in the high half of each byte; other formats have one part."""
        x = jnp.pad(x, ((0, 0), (0, self._width - x.shape[1])))
        if self.kind != "int4":
            return [x]
        pairs = x.reshape(len(x), -1, 2, self.codes.shape[-1])
        return [pairs[:, :, half].reshape(len(x), -1) for half in (0, 1)]

    def _pieces(self) -> list[Array]:
        """Dequantise into the parts of `_split`, each [*leading output code]."""
        codes, step, low = self.codes, self.step, self.low
        halves = (codes & 15, codes >> 4) if self.kind == "int4" else (codes,)

        def number(half: Array) -> Array:
            found = _wide(half)
            if step is not None:
                found = found * step[..., None].astype(jnp.float32)
            if low is not None:
                found = found + low[..., None].astype(jnp.float32)
            return found.reshape(*half.shape[:-2], -1).astype(self.dtype)

        return [number(half) for half in halves]

    def _decoded(self) -> Float[Array, "*leading output input"]:
        """Dequantise, with the inputs in their order and without padding."""
        shape = self.codes.shape
        joined = jnp.concatenate([piece.reshape(shape) for piece in self._pieces()], axis=-1)
        flat = joined.reshape(*shape[:-2], -1)
        return flat[..., : math.prod(self.inputs)]


def _wide(codes: Array) -> Float[Array, "..."]:
    """Convert codes to float32. The bits of bfloat16 are shifted as integers, because XLA's CPU
    converts bfloat16 arrays two to four times as slowly."""
    if codes.dtype != jnp.uint16:
        return codes.astype(jnp.float32)
    bits = codes.astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits << 16, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CompactLayers:
    """The weights of all repeats of a layer as separate arrays, so that selecting one layer copies
    nothing."""

    layers: tuple[Compact, ...]

    def __getitem__(self, repeat: int) -> Compact:
        return self.layers[repeat]

    def __mul__(self, factor: Number) -> CompactLayers:
        return CompactLayers(tuple(layer * factor for layer in self.layers))

    def astype(self, dtype: DTypeLike) -> CompactLayers:
        """Change the type that the weights are dequantised to."""
        return CompactLayers(tuple(layer.astype(dtype) for layer in self.layers))


def is_compact(weight: Any) -> bool:
    """Whether a weight is stored in few bits; for `is_leaf` of `jax.tree.map`."""
    return isinstance(weight, Compact | CompactLayers)


def any_compact(weights: Any) -> bool:
    """Whether any weight of a tree is stored in few bits."""
    return any(map(is_compact, jax.tree.leaves(weights, is_leaf=is_compact)))


def fits(name: str, param: Param) -> bool:
    """Whether `compacted` can store a weight: an embedding, or a matrix whose contracted axes come
    first. Gains, biases, routers and the weights of position encodings keep their type.
    """
    if "position" in name.split(".") or len(param.own_shape) < 2:
        return False
    if param.role == "embedding":
        return not param.leading
    own = tuple(param.dims)[len(param.leading) :]
    first = own[: len(param.fan_in)] == param.fan_in
    return param.role in ("hidden", "readout") and 0 < len(param.fan_in) < len(own) and first


def compacted(param: Param, weight: Array, kind: str) -> Compact:
    """Store a weight that `fits` in few bits.

    weight: of the declared shape, or, of an embedding, some of its rows
    """
    shape, leading = weight.shape, len(param.leading)
    if param.role == "embedding":
        outputs, inputs = shape[:1], shape[1:]
    else:
        end = leading + len(param.fan_in)
        inputs, outputs = shape[leading:end], shape[end:]
    turned = param.role == "embedding"
    sides = (outputs, inputs) if turned else (inputs, outputs)
    matrix = weight.reshape(*shape[:leading], *map(math.prod, sides))
    codes, step, low = _encoded(matrix, kind, turned)
    return Compact(codes, step, low, inputs, outputs, kind, turned)


@partial(jax.jit, static_argnums=(1, 2))
def _encoded(
    matrix: Float[Array, "*leading row column"], kind: str, turned: bool
) -> tuple[Array, Array | None, Array | None]:
    """Return codes, steps and minima."""
    by_output = matrix if turned else jnp.swapaxes(matrix, -1, -2)
    if kind == "bfloat16":
        short = by_output[..., None, :].astype(jnp.bfloat16)
        return jax.lax.bitcast_convert_type(short, jnp.uint16), None, None
    width, levels = by_output.shape[-1], LEVELS[kind]
    group = min(GROUPS[kind] or width, width + width % 2)
    padding = [(0, 0)] * (by_output.ndim - 1) + [(0, -width % group)]
    # Padding repeats the last weight, which changes neither minimum nor maximum.
    padded = jnp.pad(by_output.astype(jnp.float32), padding, mode="edge")
    grouped = padded.reshape(*padded.shape[:-1], -1, group)
    if kind == "int8":
        low, highest = None, jnp.max(jnp.abs(grouped), axis=-1)
        offset = grouped
    else:
        low, highest = _below(jnp.min(grouped, axis=-1)), jnp.max(grouped, axis=-1)
        offset = grouped - low[..., None].astype(jnp.float32)
        highest = highest - low.astype(jnp.float32)
    step = -_below(-highest / levels)
    wide = step[..., None].astype(jnp.float32)
    number = jnp.round(offset / jnp.where(wide == 0, 1, wide))
    if kind == "int8":
        return jnp.clip(number, -levels, levels).astype(jnp.int8), step, None
    number = jnp.clip(number, 0, levels).astype(jnp.uint8)
    half = group // 2
    return number[..., :half] | number[..., half:] << 4, step, low


def _below(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Round down to bfloat16."""
    near = x.astype(jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(near, jnp.uint16)
    # One unit in the last place down: away from zero for negative numbers.
    down = jnp.where(near < 0, bits + 1, bits - 1).astype(jnp.uint16)
    lower = jax.lax.bitcast_convert_type(down, jnp.bfloat16)
    zero = jnp.asarray(-jnp.finfo(jnp.bfloat16).tiny, jnp.bfloat16)
    lower = jnp.where(near == 0, zero, lower)
    return jnp.where(near.astype(jnp.float32) > x, lower, near)
