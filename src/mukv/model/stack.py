"""Layers over a plan at one width: what a decoder has one of and a concept model three.

The same layers run in training (equal repeats scanned, or unrolled), prefill and single steps:
what differs is only what a layer's `remember` answers, i.e. which bags of entries its queries
read. A stack knows no vocabulary: residual stream in, residual stream out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from mukv.attention import AnyAttention, Bag, Entries, Queries
from mukv.cache import FULL, Body, Cache, Calibrated, Policy, Reader, Ring, Slot
from mukv.cache.base import QUERY, append, append_some, tail_entries
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.core.params import map_params
from mukv.core.tap import capturing
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights
from mukv.model.block import AnyResidual
from mukv.model.feedforward import AnyFeedforward
from mukv.model.passes import Pass, Remember, layer_params
from mukv.model.plan import ResolvedLayer, Stage, resolve, scannable
from mukv.scaling.parameterization import Scaling


@dataclass(frozen=True)
class Stack:
    """plan: stages of layers; what a layer leaves open is `attention` and `mlp`. first: number of
    the first layer in the whole model. every: tokens that an entry stands for, at least. asked:
    tokens that a query stands for, None for as many. prefix: of the names of dimensions, where a
    model has stacks of several widths.
    """

    d_model: int
    attention: AnyAttention
    mlp: AnyFeedforward
    plan: tuple[Stage, ...]
    norm: RMSNorm
    residual: AnyResidual
    scaling: Scaling
    first: int = 0
    every: int = 1
    asked: int | None = None
    prefix: str = ""

    @cached_property
    def layers(self) -> tuple[ResolvedLayer, ...]:
        """Every layer, in order."""
        layers = resolve(self.plan, self.attention, self.mlp)
        return tuple(replace(layer, attention=self._scaled(layer.attention)) for layer in layers)

    def _scaled(self, attention: AnyAttention) -> AnyAttention:
        """With its logits as the parameterisation wants them at this width."""
        query = attention.read_params(self.d_model)["query"].prefixed(self.prefix)
        factor = self.scaling.logit_factor(query)
        if factor == 1:
            return attention
        return replace(attention, scale=factor * (attention.scale or attention.query_dim**-0.5))

    @cached_property
    def writers(self) -> tuple[ResolvedLayer, ...]:
        """The layers that have a cache."""
        return tuple(layer for layer in self.layers if layer.writes)

    # Weights

    def params(self) -> dict[str, Any]:
        """All weights; those of a stage's slot are stacked over its repeats, slots are named by
        their place ("stage0.slot1")."""

        def declared(layer: ResolvedLayer, repeats: int) -> dict[str, Any]:
            own = layer_params(layer, self.norm, self.residual, self.d_model)
            return map_params(lambda param: param.prefixed(self.prefix).stacked(repeats), own)

        return {
            f"stage{s}": {
                f"slot{layer.slot}": declared(layer, stage.repeats)
                for layer in self.layers
                if layer.stage == s and layer.repeat == 0
            }
            for s, stage in enumerate(self.plan)
        }

    def unstack(self, weights: Weights) -> list[Any]:
        """The same weights, one entry per layer."""
        return [
            jax.tree.map(
                lambda leaf, repeat=layer.repeat: leaf[repeat],
                weights[f"stage{layer.stage}"][f"slot{layer.slot}"],
            )
            for layer in self.layers
        ]

    # Training

    def forward(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        segment: Int[Array, "batch token"] | None,
        compute: Compute,
    ) -> Residual:
        """The residual stream after the last layer.

        weights: stacked. position: place in the document. segment: number of the document; tokens
        see only their own (None: one per row).
        """

        def remember(
            layer: ResolvedLayer, written: dict[str, Array], query: Callable[[], Queries]
        ) -> tuple[Bag, ...]:
            group_segment = None if segment is None else segment[:, None]
            return (Entries(written, position[:, None], segment=group_segment),)

        run = self._pass(compute, position, remember, aligned=True, segment=segment)
        known: dict[int, tuple[Bag, ...]] = {}
        for s, stage in enumerate(self.plan):
            stacked = weights[f"stage{s}"]
            here = [layer for layer in self.layers if layer.stage == s]
            if compute.unroll or capturing() or stage.repeats == 1 or not scannable(s, self.layers):
                for layer in here:
                    own = jax.tree.map(lambda leaf, r=layer.repeat: leaf[r], stacked)
                    x = run.layer(layer, own[f"slot{layer.slot}"], x, known)
            else:
                first = here[: len(stage.pattern)]

                def repeat(x: Residual, own: Any, first: Any = first) -> tuple[Residual, None]:
                    inner = dict(known)
                    for layer in first:
                        x = run.layer(layer, own[f"slot{layer.slot}"], x, inner)
                    return x, None

                x, _ = jax.lax.scan(repeat, x, stacked)
        return x

    def _pass(
        self,
        compute: Compute,
        position: Int[Array, "batch token"],
        remember: Remember,
        aligned: bool,
        segment: Int[Array, "batch token"] | None = None,
    ) -> Pass:
        shared = (self.layers, self.norm, self.residual, self.d_model, self.first)
        return Pass(*shared, compute, position, segment, remember, aligned)

    # Decoding

    def empty_cache(
        self,
        batch: int,
        length: int,
        tail: int,
        dtype: jnp.dtype,
        by_row: bool = False,
        policy: Policy = FULL,
        centres: Calibrated | None = None,
    ) -> Cache:
        """Room for `length` entries a row in the bodies and `tail` behind them. by_row: rows go on
        at steps of their own. policy: of layers without a window, `centres` its calibrated ones."""
        whole = [layer.index for layer in self.writers if layer.window is None]

        def zeros(layer: ResolvedLayer, slots: int) -> dict[str, Array]:
            shapes = layer.attention.written(self.d_model, batch, slots, dtype)
            return {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}

        def slot(layer: ResolvedLayer) -> Slot:
            places = zeros(layer, tail)
            if policy.everything or layer.window is not None:
                slots = min(length, layer.window or length)
                return Slot(Ring(zeros(layer, slots), layer.window is not None), places)
            place = whole.index(layer.index), len(whole)
            own = (centres or {}).get(layer.index, {})
            body = policy.body(layer.attention, self.d_model, batch, length, dtype, place, own)
            if body.needs_queries:
                shape = (batch, layer.attention.heads, tail, layer.attention.query_dim)
                places[QUERY] = jnp.zeros(shape, dtype)
            return Slot(body, places)

        return Cache(
            slots=tuple(map(slot, self.writers)),
            length=jnp.zeros(batch, jnp.int32),
            filled=jnp.zeros(batch if by_row else (), jnp.int32),
        )

    def check_policy(self, policy: Policy) -> None:
        """Raise BadInput, with the reason, for a policy that does not fit these layers."""
        if policy.everything:
            return
        whole = [layer for layer in self.layers if layer.window is None]
        if not whole:
            allowed = "full: each layer has a window, which drops entries by itself"
            raise BadInput("policy", str(policy), allowed)
        for layer in whole:
            policy.check(self.first + layer.index, layer.attention)

    def prefill(
        self,
        weights: Sequence[Any],
        cache: Cache,
        x: Residual,
        count: Int[Array, " batch"],
        fresh: bool,
        compute: Compute,
    ) -> tuple[Residual, Cache]:
        """Read the first `count` entries of each row at once: the stream after the last layer, and
        the cache.

        weights: one entry per layer. The tail must be empty. fresh: the cache is known to be
        empty, so that only the new entries are read.
        """
        position = cache.length[:, None] + jnp.arange(x.shape[1])
        bodies: dict[int, Body] = {}

        def remember(
            layer: ResolvedLayer, written: dict[str, Array], query: Callable[[], Queries]
        ) -> tuple[Bag, ...]:
            body = cache.slots[self.writers.index(layer)].body
            reading = weights[layer.index]["read"]
            reader = Reader(layer.attention, reading, query() if body.needs_queries else None)
            bodies[layer.index] = body.extended(written, cache.length, count, reader, fresh)
            new = Entries(written, position[:, None])
            return (new,) if fresh else (body.entries(cache.length), new)

        x = self._pass(compute, position, remember, aligned=fresh).all(weights, x)
        slots = tuple(
            Slot(bodies[layer.index], slot.tail)
            for layer, slot in zip(self.writers, cache.slots, strict=True)
        )
        return x, Cache(slots, cache.length + count, cache.filled)

    def step(
        self,
        weights: Sequence[Any],
        cache: Cache,
        x: Residual,
        compute: Compute,
        which: Bool[Array, " batch"] | None = None,
    ) -> tuple[Residual, Cache]:
        """Read one entry per row: the stream after the last layer, and the cache, one entry fuller.

        weights: one entry per layer. which: rows whose entry stays, in a cache that goes on by
        row; None for all. The bodies come back as they are: leave them out of a loop's carry.
        """
        position = cache.position()[:, None]
        tails: dict[int, dict[str, Array]] = {}
        more = 1 if which is None else which.astype(jnp.int32)

        def remember(
            layer: ResolvedLayer, written: dict[str, Array], query: Callable[[], Queries]
        ) -> tuple[Bag, ...]:
            slot = cache.slots[self.writers.index(layer)]
            if slot.body.needs_queries:
                written = {**written, QUERY: _by_head(query())}
            tails[layer.index] = (
                append(slot.tail, written, cache.filled)
                if which is None
                else append_some(slot.tail, written, cache.filled, which)
            )
            newest = tail_entries(tails[layer.index], cache.length, cache.filled + more)
            return slot.body.bag(cache.length), newest

        x = self._pass(compute, position, remember, aligned=False).all(weights, x)
        slots = tuple(
            Slot(slot.body, tails[layer.index])
            for layer, slot in zip(self.writers, cache.slots, strict=True)
        )
        return x, Cache(slots, cache.length, cache.filled + more)

    def fold(self, weights: Sequence[Any], cache: Cache) -> Cache:
        """Move the tails into the bodies. weights: one entry per layer."""
        added = jnp.broadcast_to(cache.filled, cache.length.shape)

        def folded(layer: ResolvedLayer, slot: Slot) -> Slot:
            attention, new = layer.attention, dict(slot.tail)
            query = new.pop(QUERY, None)
            if query is not None:
                query = query.reshape(len(added), attention.key_heads, -1, *query.shape[2:])
            reader = Reader(attention, weights[layer.index]["read"], query)
            return Slot(slot.body.extended(new, cache.length, added, reader), slot.tail)

        slots = tuple(map(folded, self.writers, cache.slots))
        return Cache(slots, cache.length + added, jnp.zeros_like(cache.filled))


def _by_head(query: Queries) -> Float[Array, "batch heads query query_dim"]:
    """Queries as a tail keeps them."""
    batch, kv_heads, group, length, width = query.shape
    return query.reshape(batch, kv_heads * group, length, width)
