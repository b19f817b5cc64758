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

from mukv.attention import AnyAttention, Bag, EntryStore, Queries, Written
from mukv.cache import FULL, Cache, Calibrated, Policy, Reader, Ring, Slot
from mukv.cache.base import QUERY
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.core.params import map_params
from mukv.core.tap import capturing
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights
from mukv.model.auxiliary import Auxiliary, over_layers
from mukv.model.block import AnyResidual
from mukv.model.cache_update import LayerBag, LayerMemory, joined, memories
from mukv.model.feedforward import AnyFeedforward
from mukv.model.passes import Memory, Pass, Remember, layer_params
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
        query = attention.logit_weight(self.d_model)
        factor = 1 if query is None else self.scaling.logit_factor(query.prefixed(self.prefix))
        if factor == 1:
            return attention
        return replace(attention, scale=factor * (attention.scale or attention.query_dim**-0.5))

    @cached_property
    def writers(self) -> tuple[ResolvedLayer, ...]:
        """The layers that have a cache."""
        return tuple(layer for layer in self.layers if layer.writes)

    @cached_property
    def bags(self) -> tuple[LayerBag, ...]:
        """The stores of entries that the layers write, in the order of the cache's slots."""
        return tuple((layer, *bag) for layer in self.writers for bag in layer.bags.items())

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
    ) -> tuple[Residual, Auxiliary]:
        """The residual stream after the last layer, and what the layers report: penalties summed,
        other numbers averaged over the layers that report them.

        weights: stacked. position: place in the document. segment: number of the document from 1,
        0 or less for padding; tokens see only their own (None: one per row).
        """

        def remember(
            layer: ResolvedLayer,
            _: Any,
            memory: Memory,
            written: Written,
            __: Callable[[], Queries],
        ) -> tuple[tuple[Bag, ...], Memory]:
            bags = layer.bags.items()
            entries = (bag.entries(written[name], position, segment) for name, bag in bags)
            return tuple(entries), memory

        run = self._pass(compute, position, remember, aligned=True, segment=segment)
        run = replace(
            run, counted=jnp.ones_like(position, bool) if segment is None else segment > 0
        )
        reported: list[Auxiliary] = []
        known: dict[int, tuple[Bag, ...]] = {}
        for s, stage in enumerate(self.plan):
            stacked = weights[f"stage{s}"]
            here = [layer for layer in self.layers if layer.stage == s]
            if compute.unroll or capturing() or stage.repeats == 1 or not scannable(s, self.layers):
                for layer in here:
                    own = jax.tree.map(lambda leaf, r=layer.repeat: leaf[r], stacked)
                    x, more = run.layer(layer, own[f"slot{layer.slot}"], x, known)
                    reported.append(more)
            else:
                first = here[: len(stage.pattern)]

                def repeat(
                    x: Residual, own: Any, first: Any = first
                ) -> tuple[Residual, list[Auxiliary]]:
                    inner, found = dict(known), []
                    for layer in first:
                        x, more = run.layer(layer, own[f"slot{layer.slot}"], x, inner)
                        found.append(more)
                    return x, found

                x, more = jax.lax.scan(repeat, x, stacked)
                reported += more
        return x, over_layers(reported)

    def _pass(
        self,
        compute: Compute,
        position: Int[Array, "batch token"],
        remember: Remember,
        aligned: bool,
        segment: Int[Array, "batch token"] | None = None,
        held: dict[int, LayerMemory] | None = None,
        added: Int[Array, " batch"] | None = None,
    ) -> Pass:
        shared = (self.layers, self.norm, self.residual, self.d_model, self.first)
        given = (compute, position, segment, remember, aligned)
        return Pass(*shared, *given, held or {}, added)

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
        at steps of their own. policy: of stores without a window, `centres` its calibrated ones."""
        whole = [(layer.index, name) for layer in self.writers for name in layer.whole]

        def slot(layer: ResolvedLayer, name: str, bag: EntryStore) -> Slot:
            def zeros(entries: int) -> dict[str, Array]:
                tokens = entries * bag.every
                shapes = layer.attention.written(self.d_model, batch, tokens, dtype)[name]
                return {part: jnp.zeros(shape.shape, shape.dtype) for part, shape in shapes.items()}

            places = zeros(bag.places(tail))
            if policy.everything or bag.window is not None:
                ring = Ring(zeros(bag.room(length)), bag.window is not None)
                return Slot(ring, places, bag)
            place = whole.index((layer.index, name)), len(whole)
            own = (centres or {}).get(layer.index, {})
            room = batch, bag.room(length), dtype
            body = policy.body(layer.attention, self.d_model, *room, place, own, name)
            if body.needs_queries:
                shape = (batch, layer.attention.heads, tail, layer.attention.query_dim)
                places[QUERY] = jnp.zeros(shape, dtype)
            return Slot(body, places, bag)

        return Cache(
            slots=tuple(slot(*bag) for bag in self.bags),
            states=tuple(
                {name: state.zeros(batch) for name, state in layer.attention.states.items()}
                for layer in self.writers
            ),
            length=jnp.zeros(batch, jnp.int32),
            filled=jnp.zeros(batch if by_row else (), jnp.int32),
            tail_size=tail,
        )

    def check_policy(self, policy: Policy) -> None:
        """Raise BadInput, with the reason, for a policy that does not fit these layers."""
        if policy.everything:
            return
        whole = [layer for layer in self.layers if layer.whole]
        if not whole:
            names = sorted({name for layer in self.layers for name in layer.attention.stores()})
            allowed = (
                f"full: each layer has a window or a state ({', '.join(names)}), which drops "
                "entries by itself"
            )
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
        position = cache.length[:, None] + jnp.arange(x.shape[1])[None]

        def remember(
            layer: ResolvedLayer,
            reading: Any,
            memory: Memory,
            written: Written,
            query: Callable[[], Queries],
        ) -> tuple[tuple[Bag, ...], Memory]:
            assert memory is not None
            slots: dict[str, Slot] = {}
            parts: list[Bag] = []
            for name, bag in layer.bags.items():
                slot, new = memory.slots[name], written[name]
                asked = query() if slot.body.needs_queries else None
                reader = Reader(layer.attention, reading, asked)
                slots[name] = slot.extended(new, cache.length, count, reader, fresh)
                parts += () if fresh else (slot.entries(cache.length),)
                parts.append(bag.entries(new, position))
            return tuple(parts), LayerMemory(slots, _states(layer, written))

        # Nothing is differentiated, and what a layer leaves in the cache must leave its checkpoint.
        compute = replace(compute, rematerialise=False)
        own = (self.bags, self.writers, cache)
        held = (memories(*own), count)
        run = self._pass(compute, position, remember, fresh, None, *held)
        x = run.all(weights, x)
        return x, replace(joined(*own, run.memories), length=cache.length + count)

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
        more = 1 if which is None else which.astype(jnp.int32)

        def remember(
            layer: ResolvedLayer,
            _: Any,
            memory: Memory,
            written: Written,
            query: Callable[[], Queries],
        ) -> tuple[tuple[Bag, ...], Memory]:
            assert memory is not None
            slots: dict[str, Slot] = {}
            parts: list[Bag] = []
            for name in layer.bags:
                slot, new = memory.slots[name], written[name]
                if slot.body.needs_queries:
                    new = {**new, QUERY: _by_head(query())}
                slots[name] = slot = slot.appended(new, cache.length, cache.filled, which)
                parts += slot.bag(cache.length), slot.newest(cache.length, cache.filled + more)
            return tuple(parts), LayerMemory(slots, _states(layer, written))

        added = jnp.broadcast_to(jnp.asarray(more), cache.length.shape)
        own = (self.bags, self.writers, cache)
        held = (memories(*own), added)
        run = self._pass(compute, position, remember, False, None, *held)
        x = run.all(weights, x)
        return x, replace(joined(*own, run.memories), filled=cache.filled + more)

    def fold(self, weights: Sequence[Any], cache: Cache) -> Cache:
        """Move the tails into the bodies. weights: one entry per layer."""
        added = jnp.broadcast_to(cache.filled, cache.length.shape)

        def folded(layer: ResolvedLayer, slot: Slot) -> Slot:
            attention, new = layer.attention, dict(slot.tail)
            query = new.pop(QUERY, None)
            if query is not None:
                query = query.reshape(len(added), attention.key_heads, -1, *query.shape[2:])
            reader = Reader(attention, weights[layer.index]["read"], query)
            return slot.extended(new, cache.length, added, reader)

        layers = (layer for layer, _, _ in self.bags)
        slots = tuple(map(folded, layers, cache.slots))
        return replace(
            cache, slots=slots, length=cache.length + added, filled=jnp.zeros_like(cache.filled)
        )


def _states(layer: ResolvedLayer, written: Written) -> dict[str, Any]:
    """Return the new states among what a layer wrote."""
    return {name: written[name] for name in layer.attention.states}


def _by_head(query: Queries) -> Float[Array, "batch heads query query_dim"]:
    """Queries as a tail keeps them."""
    batch, kv_heads, group, length, width = query.shape
    return query.reshape(batch, kv_heads * group, length, width)
