"""softmax(query . key) value, in two forms that agree.

`plain` has all logits in view, as policies and taps need. `fused` goes through the queries in
chunks and never holds a token x token tensor, forward or backward: each chunk meets only the keys
that causality and window leave to it, and recomputes its weights when gradients are taken. Where
a bias counts what lies between query and key, the chunk goes through its keys in blocks, right to
left, with an online softmax. A query that sees nothing yields zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import jax
import jax.numpy as jnp

from mukv.attention.entries import Entries
from mukv.attention.mask import Mask
from mukv.attention.recalled import Query, Recalled
from mukv.core.tap import capturing, tap
from mukv.core.typing import Array, Bool, Float, Int, Weights
from mukv.position import AnyPosition, Pairs
from mukv.position.base import Logits


def chunk_size(length: int) -> int:
    """Queries that the fused core takes at once: an eighth of them, 64 to 256.

    Small chunks skip more of what causality hides, large ones make better products. Training
    steps of 1M and 10M parameters on 4 cores, tokens/s against chunks of 256: at 256 tokens 1.25
    and 1.06 times (64), at 1,024 tokens 1.16 and 1.0 times (128; at 64 0.85 times for 10M), at
    4,096 tokens 1.0 times (128). Chunks of 512 lose 23 to 37 %.
    """
    return min(max(length // 8, 64), 256)


Out = Float[Array, "batch kv_heads group query width"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Part:
    """Keys and values of one bag of entries, where they stand, and who sees them."""

    recalled: Recalled
    position: Int[Array, "batch #kv_heads key"]
    visible: Bool[Array, "batch #kv_heads query key"]
    ordered: bool = field(default=True, metadata={"static": True})

    @classmethod
    def of(
        cls, recalled: Recalled, entries: Entries, position: Int[Array, "batch query"], mask: Mask
    ) -> Part:
        visible = mask.visible(position, entries)
        return cls(recalled, entries.position, visible, entries.ordered)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scores:
    """From products to logits.

    query: scaled, as positions see it. weights: those of the position encoding. sinks: a logit
    per head that takes its share of the softmax and gives nothing (gpt-oss); None for none.
    softcap: logits stay within +-softcap, by tanh, before positions add to them (Gemma 2).
    """

    query: Float[Array, "batch kv_heads group query query_dim"]
    query_position: Int[Array, "batch query"]
    weights: Weights
    sinks: Float[Array, "kv_heads group"] | None
    position: AnyPosition = field(metadata={"static": True})
    scale: float = field(metadata={"static": True})
    softcap: float | None = field(metadata={"static": True})

    def rows(self, start: int, stop: int) -> Scores:
        """Those of queries number `start` up to `stop`."""
        return replace(
            self,
            query=self.query[:, :, :, start:stop],
            query_position=self.query_position[:, start:stop],
        )

    def logits(self, products: Logits, part: Part) -> Logits:
        if not self.position.biases:
            return self._capped(products)
        return self.position.bias(self.weights, self._capped(products), self._pairs(part))

    def block(self, products: Logits, part: Part, after: Array) -> tuple[Logits, Array]:
        pairs = self._pairs(part)
        return self.position.bias_block(self.weights, self._capped(products), pairs, after)

    def _capped(self, products: Logits) -> Logits:
        if self.softcap is None:
            return products
        return self.softcap * jnp.tanh(products / self.softcap)

    def _pairs(self, part: Part) -> Pairs:
        return Pairs(
            query=self.query,
            query_position=self.query_position,
            key_position=part.position,
            visible=part.visible,
            ordered=part.ordered,
            scale=self.scale,
        )


def plain(query: Query, parts: Sequence[Part], scores: Scores) -> Out:
    """One softmax over all parts, which are never joined: a decode step reads a large body and a
    small tail without copying either. Parts stand in the order of their positions."""
    # Division by the sum waits until the values are added up: the smaller of the two tensors.
    weights, total = weighed(query, parts, scores)
    if capturing():
        tap("weights", weights / total)
        _show(query, parts)
    out, start = jnp.zeros((), jnp.float32), 0
    for part in parts:
        stop = start + part.position.shape[-1]
        share = jax.lax.slice_in_dim(weights, start, stop, axis=4)
        out, start = out + part.recalled.mixture(share), stop
    return (out / total).astype(query[0].dtype)


def weighed(
    query: Query, parts: Sequence[Part], scores: Scores
) -> tuple[Logits, Float[Array, "batch kv_heads group query 1"]]:
    """What each query gives to each key, and the sum to divide it by."""
    products = jnp.concatenate([part.recalled.products(query) for part in parts], axis=-1)
    whole = Part(
        parts[0].recalled,
        _end_to_end([part.position for part in parts]),
        _end_to_end([part.visible for part in parts]),
        all(part.ordered for part in parts),
    )
    logits = tap("logits", scores.logits(products, whole))
    masked = jnp.where(whole.visible[:, :, None], logits, -jnp.inf)
    top = _finite(jax.lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True)))
    if scores.sinks is not None:
        sinks = scores.sinks[..., None, None]
        top = jnp.maximum(top, jax.lax.stop_gradient(sinks))
    weights = jnp.exp(masked - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if scores.sinks is not None:
        total = total + jnp.exp(scores.sinks[..., None, None] - top)
    return weights, jnp.where(total > 0, total, 1.0)


def _end_to_end(arrays: Sequence[Array]) -> Array:
    """Joined along keys; what is the same for all heads is repeated beside what is not."""
    heads = max(array.shape[1] for array in arrays)
    alike = [jnp.broadcast_to(x, (len(x), heads, *x.shape[2:])) for x in arrays]
    return jnp.concatenate(alike, axis=-1)


def _show(query: Query, parts: Sequence[Part]) -> None:
    """Tap what was multiplied and mixed, whatever form the variant keeps it in."""
    heads = query[0].shape[1]
    tap("query", jnp.concatenate(query, axis=-1))
    keys, values = zip(*(part.recalled.dense(heads) for part in parts), strict=True)
    tap("key", jnp.concatenate(keys, axis=2))
    tap("value", jnp.concatenate(values, axis=2))


def fused(
    query: Query,
    recalled: Recalled,
    entries: Entries,
    scores: Scores,
    mask: Mask,
    chunk: int,
) -> Out:
    """Aligned self-attention by chunks of queries, each of which holds chunk x token numbers, or
    chunk x chunk where a bias is sequential.

    XLA works on several chunks at once on a CPU, so that memory falls by less than that: 1.8 times
    at 8,192 tokens, 14 times for a sequential bias (benchmarks/attention.py).
    """
    length = query[0].shape[3]
    outputs = []
    for start in range(0, length, chunk):
        stop = min(start + chunk, length)
        first = 0 if mask.window is None else max(0, start - mask.window + 1)
        attend = _at_once
        if scores.position.sequential:
            first = first // chunk * chunk
            attend = partial(_right_to_left, chunk=chunk)
        segment = None if mask.segment is None else mask.segment[:, start:stop]
        outputs.append(
            jax.checkpoint(partial(attend, window=mask.window))(
                tuple(piece[:, :, :, start:stop] for piece in query),
                recalled.slice(first, stop),
                entries.slice(first, stop),
                scores.rows(start, stop),
                segment,
            )
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=3)


def _at_once(
    query: Query,
    recalled: Recalled,
    entries: Entries,
    scores: Scores,
    segment: Array | None,
    window: int | None,
) -> Out:
    """A chunk of queries against all its keys."""
    mask = Mask(segment, window)
    return plain(query, [Part.of(recalled, entries, scores.query_position, mask)], scores)


def _right_to_left(
    query: Query,
    recalled: Recalled,
    entries: Entries,
    scores: Scores,
    segment: Array | None,
    window: int | None,
    chunk: int,
) -> Out:
    """The same in blocks of keys: those that the chunk itself wrote, which are the last ones,
    then the full chunks before it."""
    mask, own = Mask(segment, window), query[0].shape[3]
    before = entries.position.shape[-1] - own

    @jax.checkpoint
    def absorb(state: tuple[Array, ...], recalled: Recalled, entries: Entries) -> tuple[Array, ...]:
        top, total, out, after = state
        part = Part.of(recalled, entries, scores.query_position, mask)
        logits, after = scores.block(recalled.products(query), part, after)
        masked = jnp.where(part.visible[:, :, None], logits, -jnp.inf)
        higher = jnp.maximum(top, jax.lax.stop_gradient(jnp.max(masked, axis=-1)))
        weights = jnp.exp(masked - _finite(higher)[..., None])
        shrink = jnp.exp(top - _finite(higher))
        total = total * shrink + jnp.sum(weights, axis=-1)
        return higher, total, out * shrink[..., None] + recalled.mixture(weights), after

    def block(state: tuple[Array, ...], start: Array) -> tuple[tuple[Array, ...], None]:
        def cut(array: Array) -> Array:
            return jax.lax.dynamic_slice_in_dim(array, start, chunk, axis=2)

        return absorb(state, *jax.tree.map(cut, (recalled, entries))), None

    rows = query[0].shape[:-1]
    zeros, nothing = jnp.zeros(rows), jnp.zeros((*rows, recalled.width))
    if scores.sinks is None:
        top, total = jnp.full(rows, -jnp.inf), zeros
    else:
        top = jax.lax.stop_gradient(jnp.broadcast_to(scores.sinks[..., None], rows))
        total = jnp.exp(scores.sinks[..., None] - top)
    diagonal = recalled.slice(before, before + own), entries.slice(before, before + own)
    state = absorb((top, total, nothing, zeros), *diagonal)
    if before:
        state, _ = jax.lax.scan(block, state, jnp.arange(before // chunk)[::-1] * chunk)
    _, total, out, _ = state
    return (out / jnp.where(total > 0, total, 1.0)[..., None]).astype(query[0].dtype)


def _finite(top: Array) -> Array:
    """The largest logit, or 0 where nothing is visible."""
    return jnp.where(jnp.isfinite(top), top, 0.0)
