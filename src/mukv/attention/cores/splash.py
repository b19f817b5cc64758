"""Splash attention for TPUs: the kernels of `jax.experimental.pallas.ops.tpu.splash_attention`.

They visit the blocks of keys that the causal mask or the window reaches; documents, soft caps and
sinks are part of the kernels, position biases are not. A window is a number of tokens of the row,
which is the same as a distance of positions within a document of consecutive positions.

On a mesh they run on each shard of rows and KV heads, since XLA's partitioner can't split a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mukv.attention.cores.base import Demand, KernelCore, Out, Part, Scores, operands
from mukv.attention.cores.pairs import Division, Places, documents
from mukv.attention.recalled import Query
from mukv.core.compute import Compute, Platform
from mukv.core.partition import by_shard
from mukv.core.typing import Array

LANES = 128
"""Number that block sizes and widths are a multiple of."""
BLOCK = 512
"""Largest number of queries and of keys in a block."""


@dataclass(frozen=True)
class Splash(KernelCore):
    """Core for TPUs whose logits never leave the chip."""

    platforms: ClassVar[tuple[Platform, ...] | None] = ("tpu",)

    @classmethod
    def supports(cls, demand: Demand, compute: Compute) -> str | None:
        if demand.context > 1:
            return "its mask needs the queries of whole rows, which mesh.context splits"
        return super().supports(demand, compute)

    def apply(self, query: Query, parts: Sequence[Part], scores: Scores) -> Out:
        from jax.experimental.pallas.ops.tpu.splash_attention import SegmentIds

        (part,) = parts
        kind, length = query[0].dtype, query[0].shape[3]
        given = operands(query, part, self.operands)
        size = min(BLOCK, -(-length // LANES) * LANES)
        cut = Division(length, size, -(-length // size))
        padded = tuple(_widened(cut.padded(x, x.ndim - 2)) for x in given)
        asked = documents(Places.of(part, cut, cut), cut.padded(scores.query_position, 1))
        window, softcap, sinks = part.mask.window, scores.softcap, scores.sinks

        def attend(q: Array, k: Array, v: Array, *rest: Array) -> tuple[Array]:
            *sink, asking, standing = rest
            batch, kv_heads, group, tokens, width = q.shape
            kernel = self._kernel(kv_heads * group, tokens, size, window, softcap)

            def row(q: Array, k: Array, v: Array, asking: Array, standing: Array) -> Array:
                return kernel(q, k, v, SegmentIds(asking, standing), *sink)

            sink = [one.reshape(-1) for one in sink]
            flat = q.reshape(batch, kv_heads * group, tokens, width)
            out = jax.vmap(row)(flat, k, v, asking, standing)
            return (out.reshape(*q.shape[:4], -1),)

        by_head = ("batch", "kv_heads")
        own = () if sinks is None else (sinks.astype(jnp.float32),)
        names = (*(by_head,) * 3, *(("kv_heads",) for _ in own), ("batch",), ("batch",))
        (out,) = by_shard(attend, names, (by_head,))(*padded, *own, *asked)
        out = out[:, :, :, :length, : given[2].shape[-1]].astype(kind)
        # A query that sees no key, not even its own, would get the mean of all values.
        seen = (asked[0] == asked[1])[:, None, None, :length, None]
        return jnp.where(seen, out, jnp.zeros((), kind))

    def _kernel(
        self, heads: int, tokens: int, size: int, window: int | None, softcap: float | None
    ) -> Callable[..., Any]:
        """Build the kernels for this number of heads on a device and of tokens of a row."""
        # Pallas takes a tenth of a second to import, which programs for a CPU need not wait for.
        from jax.experimental.pallas.ops.tpu import splash_attention as splash

        shape = (tokens, tokens)
        one = splash.CausalMask(shape)
        if window is not None:
            one = splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
        sizes = splash.BlockSizes(
            *(size,) * 3,
            block_q_dkv=size,
            block_kv_dkv=size,
            block_kv_dkv_compute=size,
            block_q_dq=size,
            block_kv_dq=size,
        )
        return splash.make_splash_mha_single_device(
            splash.MultiHeadMask([one] * heads),
            block_sizes=sizes,
            attn_logits_soft_cap=softcap,
            interpret=self.interpret,
        )


def _widened(x: Array) -> Array:
    """Pad the last axis with zeros to a multiple of LANES."""
    wide = -x.shape[-1] % LANES
    return jnp.pad(x, [*((0, 0),) * (x.ndim - 1), (0, wide)]) if wide else x
