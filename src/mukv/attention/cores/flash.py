"""FlashAttention-2 for GPUs: blocks and operands for the kernels of `flash_kernels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import jax.numpy as jnp

from mukv.attention.cores.base import KernelCore, Out, Part, Scores, operands
from mukv.attention.cores.pairs import Division, Places, documents, reachable
from mukv.attention.recalled import Query
from mukv.core.compute import Platform
from mukv.core.partition import by_shard
from mukv.core.typing import Array

BLOCK = 64
"""Queries per chunk and keys per block."""
NARROWEST = 16
"""Smallest side of an operand of Triton's matrix products; all sides are powers of two."""


@dataclass(frozen=True)
class Flash(KernelCore):
    """Core for GPUs whose logits never leave the chip."""

    platforms: ClassVar[tuple[Platform, ...] | None] = ("gpu",)

    def apply(self, query: Query, parts: Sequence[Part], scores: Scores) -> Out:
        # Pallas takes a tenth of a second to import, which programs for a CPU need not wait for.
        from mukv.attention.cores.flash_kernels import Kernels, Where, attend

        (part,) = parts
        kind, length = query[0].dtype, query[0].shape[3]
        given = operands(query, part, self.operands)
        rows, keys = (_division(number) for number in (length, given[1].shape[2]))
        window = part.mask.window
        places = Places.of(part, rows, keys)
        position = rows.padded(scores.query_position, 1)
        seen = reachable(rows, keys, window, position, places)[:, 0]
        own, keys_own = documents(places, position)
        (first, last), (start, stop) = _ends(seen), _ends(seen.swapaxes(1, 2))
        if part.mask.aligned:
            # Of packed documents a chunk may seem to see the blocks after its own.
            chunks = jnp.arange(rows.number, dtype=jnp.int32)[None]
            last, start = jnp.minimum(last, chunks + 1), jnp.maximum(start, chunks)
        where = Where(
            position=position,
            document=own,
            key_position=places.position[:, 0],
            key_document=keys_own,
            first=first,
            last=last,
            start=start,
            stop=stop,
        )
        padded = tuple(
            cut.padded(_widened(x), x.ndim - 2)
            for cut, x in zip((rows, keys, keys), given, strict=True)
        )
        sinks = scores.sinks
        if sinks is None:
            sinks = jnp.full(query[0].shape[1:3], -jnp.inf)
        kernels = Kernels(rows, keys, window, scores.softcap, self.interpret)
        by_head = ("batch", "kv_heads")
        names = (*(by_head,) * 3, ("kv_heads",), *(("batch",),) * len(where))
        shard = by_shard(lambda *given: (attend(kernels, *given),), names, (by_head,))
        (out,) = shard(*padded, sinks.astype(jnp.float32), *where)
        return out[:, :, :, :length, : given[2].shape[-1]].astype(kind)


def _division(length: int) -> Division:
    """Divide queries into chunks, or keys into blocks."""
    size = min(BLOCK, _power(length))
    return Division(length, size, -(-length // size))


def _ends(seen: Array) -> tuple[Array, Array]:
    """Return the first true place along the last axis, and the one after the last."""
    stop = seen.shape[-1] - jnp.argmax(seen[..., ::-1], axis=-1)
    return jnp.argmax(seen, axis=-1).astype(jnp.int32), stop.astype(jnp.int32)


def _power(length: int) -> int:
    """Return the smallest power of two that is at least `length` and `NARROWEST`."""
    return max(NARROWEST, 1 << (length - 1).bit_length())


def _widened(x: Array) -> Array:
    """Pad the last axis with zeros to a power of two."""
    wide = _power(x.shape[-1]) - x.shape[-1]
    return jnp.pad(x, [*((0, 0),) * (x.ndim - 1), (0, wide)]) if wide else x
