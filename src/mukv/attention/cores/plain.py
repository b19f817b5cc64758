"""Attention that computes all logits at once, for decoding steps, cache policies and taps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import jax
import jax.numpy as jnp

from mukv.attention.cores.base import Core, Demand, Out, Part, Scores, Shown, finite
from mukv.attention.recalled import Query
from mukv.core.broadcast import with_rank
from mukv.core.compute import Compute
from mukv.core.tap import capturing, tap
from mukv.core.typing import Array, Float
from mukv.position.base import Logits


@dataclass(frozen=True)
class Plain(Core):
    """Core that computes all logits at once.

    Keys and values of different parts are not concatenated, so that a decode step reads a large
    body and a small tail without copying either.
    """

    @classmethod
    def supports(cls, demand: Demand, compute: Compute) -> str | None:
        return None

    def apply(self, query: Query, parts: Sequence[Part], scores: Scores) -> Out:
        return mixed(query, parts, scores)[0]


def mixed(query: Query, parts: Sequence[Part], scores: Scores) -> tuple[Out, Logits]:
    """Attend to all parts in one softmax; return the result, which has the type of the query, and
    the attention weights, float32.
    """
    # The sum divides the output instead of the weights, because the output is smaller.
    weights, total = weighed(query, parts, scores)
    if capturing():
        tap("weights", weights / total)
        _tap_inputs(query, parts)
    out, start = jnp.zeros((), jnp.float32), 0
    for part in parts:
        stop = start + part.entries.position.shape[-1]
        share = jax.lax.slice_in_dim(weights, start, stop, axis=4)
        out, start = out + part.recalled.mixture(share), stop
    return (out / total).astype(query[0].dtype), weights / total


def weighed(
    query: Query, parts: Sequence[Part], scores: Scores
) -> tuple[Logits, Float[Array, "batch kv_heads group query 1"]]:
    """Compute unnormalised attention weights over the keys of all parts, and the sum per query."""
    products = jnp.concatenate([part.recalled.products(query) for part in parts], axis=-1)
    shown = [part.shown(scores.query_position) for part in parts]
    whole = Shown(
        _concatenated([one.position for one in shown]),
        _concatenated([one.visible for one in shown]),
        all(one.ordered for one in shown),
    )
    logits = tap("logits", _faded(scores.logits(products, whole), parts, scores))
    masked = jnp.where(whole.visible[:, :, None], logits, -jnp.inf)
    top = finite(jax.lax.stop_gradient(jnp.max(masked, axis=-1, keepdims=True)))
    if scores.sinks is not None:
        sinks = with_rank(scores.sinks[..., None, None], 5)
        top = jnp.maximum(top, jax.lax.stop_gradient(sinks))
    weights = jnp.exp(masked - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if scores.sinks is not None:
        total = total + jnp.exp(with_rank(scores.sinks[..., None, None], 5) - top)
    return weights, jnp.where(total > 0, total, 1.0)


def _faded(logits: Logits, parts: Sequence[Part], scores: Scores) -> Logits:
    """Apply `Recalled.faded` to the logits of each part."""
    if not any(part.recalled.fades for part in parts):
        return logits
    stops = list(accumulate(part.entries.position.shape[-1] for part in parts))
    pieces = zip(jnp.split(logits, stops[:-1], axis=-1), parts, strict=True)
    query = scores.query_position
    found = [part.recalled.faded(own, query, part.entries.position) for own, part in pieces]
    return jnp.concatenate(found, axis=-1)


def _concatenated(arrays: Sequence[Array]) -> Array:
    """Concatenate along keys; arrays with one head are broadcast to the heads of the others."""
    heads = max(array.shape[1] for array in arrays)
    broadcast = [jnp.broadcast_to(x, (len(x), heads, *x.shape[2:])) for x in arrays]
    return jnp.concatenate(broadcast, axis=-1)


def _tap_inputs(query: Query, parts: Sequence[Part]) -> None:
    """Tap queries, keys and values in full, whatever form the variant stores them in."""
    heads = query[0].shape[1]
    tap("query", jnp.concatenate(query, axis=-1))
    keys, values = zip(*(part.recalled.dense(heads) for part in parts), strict=True)
    tap("key", jnp.concatenate(keys, axis=2))
    tap("value", jnp.concatenate(values, axis=2))
