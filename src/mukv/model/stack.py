"""A stack of layers with one width.

Training (repeats scanned or unrolled), prefill and decoding steps run the same layers. They differ
only in the function `remember`, which returns the bags of entries that the queries of a layer read.
A stack maps a residual stream to a residual stream; it has no embedding or readout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp

from mukv.attention import AnyAttention, Attention
from mukv.cache import Cache, Slot, choosing
from mukv.cache.base import QUERY
from mukv.core.compact import any_compact, is_compact
from mukv.core.compute import Compute
from mukv.core.norm import RMSNorm
from mukv.core.params import map_params
from mukv.core.tap import capturing
from mukv.core.typing import Array, Bool, Int, Residual, Weights
from mukv.model.auxiliary import Auxiliary, over_layers
from mukv.model.block import AnyResidual
from mukv.model.cache_update import LayerBag, LayerMemory, extended, joined, memories
from mukv.model.evicting import AnyThrough
from mukv.model.feedforward import AnyFeedforward
from mukv.model.layer_inputs import Inputs, LayerInputs
from mukv.model.passes import (
    Pass,
    PassedOn,
    Remember,
    by_repeat,
    layer_params,
    of_layer,
)
from mukv.model.plan import ResolvedLayer, Stage, resolve, scannable
from mukv.model.remember import One, Several, WholeRows, length_after, positions
from mukv.scaling.parameterization import Scaling


@dataclass(frozen=True)
class Stack:
    """Layers of one width. Its methods call the vectors of a row tokens.

    plan: stages of layers; `attention` and `mlp` are used by layers that name none
    first: number of the first layer in the whole model
    inputs: what layers do with inputs of their own, which `given` in the methods below holds for
        all of them; None if they have none
    """

    d_model: int
    attention: AnyAttention
    mlp: AnyFeedforward
    plan: tuple[Stage, ...]
    norm: RMSNorm
    residual: AnyResidual
    scaling: Scaling
    first: int = 0
    inputs: LayerInputs | None = None

    @cached_property
    def layers(self) -> tuple[ResolvedLayer, ...]:
        """All layers, in order."""
        layers = resolve(self.plan, self.attention, self.mlp)
        return tuple(replace(layer, attention=self._scaled(layer.attention)) for layer in layers)

    def _scaled(self, attention: AnyAttention) -> AnyAttention:
        """Multiply the scale of the logits by the parameterisation's factor for this width."""
        if not isinstance(attention, Attention):
            return attention
        factor = self.scaling.logit_factor(attention.logit_weight(self.d_model))
        if factor == 1:
            return attention
        return replace(attention, scale=factor * (attention.scale or attention.query_dim**-0.5))

    @cached_property
    def writers(self) -> tuple[ResolvedLayer, ...]:
        """The layers that write entries and therefore have a cache."""
        return tuple(layer for layer in self.layers if layer.writes)

    @cached_property
    def bags(self) -> tuple[LayerBag, ...]:
        """The stores of entries of all layers, in the order of the cache's slots."""
        return tuple((layer, *bag) for layer in self.writers for bag in layer.bags.items())

    @cached_property
    def whole(self) -> tuple[tuple[ResolvedLayer, str], ...]:
        """The stores that cache policies apply to, those without a window: layer and name."""
        return tuple((layer, name) for layer in self.writers for name in layer.whole)

    # Weights

    def params(self) -> dict[str, Any]:
        """Declare all weights, stacked over the repeats of each stage.

        They are named by stage and place in the pattern, such as "stage0.slot1".
        """

        def declared(layer: ResolvedLayer, repeats: int) -> dict[str, Any]:
            own = layer_params(layer, self.norm, self.residual, self.d_model, self.inputs)
            return map_params(lambda param: param.stacked(repeats), own)

        return {
            f"stage{s}": {
                f"slot{layer.slot}": declared(layer, stage.repeats)
                for layer in self.layers
                if layer.stage == s and layer.repeat == 0
            }
            for s, stage in enumerate(self.plan)
        }

    def unstack(self, weights: Weights) -> list[Any]:
        """Return the weights with one entry per layer."""
        return [
            _repeat(weights[f"stage{layer.stage}"][f"slot{layer.slot}"], layer.repeat)
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
        through: AnyThrough | None = None,
        given: Inputs | None = None,
    ) -> tuple[Residual, Auxiliary]:
        """Run whole rows through all layers.

        weights: stacked over repeats
        x: residual stream before the first layer
        position: place of each token in its document, from 0
        segment: number of each token's document, from 1, and 0 or less for padding; tokens attend
            within their document only; one document per row if None
        through: a cache policy or gates that drop entries between tokens; None for none

        Returns the residual stream after the last layer, and the auxiliary numbers over all layers
        (see `over_layers`).
        """
        remember = WholeRows(position, segment, through, self.place)
        run = self._pass(compute, position, remember, aligned=True, segment=segment)
        run = replace(
            run, counted=jnp.ones_like(position, bool) if segment is None else segment > 0
        )
        reported: list[Auxiliary] = []
        known: dict[int, PassedOn] = {}
        for s, stage in enumerate(self.plan):
            stacked = weights[f"stage{s}"]
            here = [layer for layer in self.layers if layer.stage == s]
            apart = compute.unroll or capturing() or any_compact(stacked)
            apart = apart or (through is not None and not through.alike(self, s, x.shape[1]))
            if apart or stage.repeats == 1 or not scannable(s, self.layers):
                for layer in here:
                    own = _repeat(stacked[f"slot{layer.slot}"], layer.repeat)
                    x, more = run.layer(layer, own, x, known, of_layer(given, layer.index))
                    reported.append(more)
            else:
                first = here[: len(stage.pattern)]

                def repeat(
                    x: Residual, scanned: Any, first: Any = first
                ) -> tuple[Residual, list[Auxiliary]]:
                    (weights, given, later), inner, found = scanned, dict(known), []
                    own_run = replace(run, remember=replace(remember, later=later))
                    for layer in first:
                        own = weights[f"slot{layer.slot}"], x, inner, of_layer(given, layer.slot)
                        x, more = own_run.layer(layer, *own)
                        found.append(more)
                    return x, found

                later = len(first) * jnp.arange(stage.repeats)
                x, more = jax.lax.scan(repeat, x, (stacked, by_repeat(given, here), later))
                reported += more
        return x, over_layers(reported)

    def place(self, layer: ResolvedLayer, name: str) -> tuple[int, int]:
        """Return the index of a store among those with a policy, and their number."""
        index = [(each.index, own) for each, own in self.whole].index((layer.index, name))
        return index, len(self.whole)

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
        """Make a pass with the settings of this stack."""
        shared = (self.layers, self.norm, self.residual, self.d_model, self.first)
        given = (compute, position, segment, remember, aligned)
        return Pass(*shared, *given, memories=held or {}, added=added, inputs=self.inputs)

    # Decoding

    def prefill(
        self,
        weights: Sequence[Any],
        cache: Cache,
        x: Residual,
        count: Int[Array, " batch"],
        fresh: bool,
        compute: Compute,
        given: Inputs | None = None,
        owned: bool = False,
    ) -> tuple[Residual, Cache]:
        """Read the first `count` tokens of each row in one pass.

        weights: one entry per layer
        cache: cache with an empty tail
        fresh: whether the cache is empty, so that only the new tokens need to be read
        owned: whether the arrays of the cache may be overwritten

        Returns the residual stream after the last layer, and the updated cache.
        """
        run = replace(self._several(cache, x, count, fresh, compute), owned=owned)
        x = run.all(weights, x, given)
        after = joined(self.bags, self.writers, cache, run.memories)
        return x, replace(after, length=length_after(cache.length, count))

    def read_block(
        self,
        weights: Sequence[Any],
        cache: Cache,
        x: Residual,
        compute: Compute,
        joins: bool,
        given: Inputs | None = None,
    ) -> tuple[Residual, Cache]:
        """Read tokens in one pass, each of which reads what a decode step reads.

        weights: one entry per layer
        cache: cache with an empty tail
        joins: whether the new entries join the bodies; if not, the cache is returned unchanged

        Returns the residual stream after the last layer, and the cache after the steps and a fold.
        """
        count = jnp.full(len(x), x.shape[1])
        before = replace(cache, slots=choosing(cache.slots, False))
        run = self._several(before, x, count, False, compute, as_steps=True, joins=joins)
        if any(slot.body.by_query for slot in cache.slots):
            run = replace(run, single=True)
        x = run.all(weights, x, given)
        if not joins:
            return x, cache
        after = joined(self.bags, self.writers, before, run.memories)
        return x, replace(after, length=cache.length + count)

    def _several(
        self,
        cache: Cache,
        x: Residual,
        count: Int[Array, " batch"],
        fresh: bool,
        compute: Compute,
        **reading: bool,
    ) -> Pass:
        """Make a pass of several tokens per row. reading: further fields of `Several`."""
        position = positions(x.shape[1], cache.length)
        remember = Several(cache.length, count, position, fresh, **reading)
        # Nothing is differentiated, and entries computed inside jax.checkpoint could not leave it.
        compute = replace(compute, rematerialise=False)
        held = memories(self.bags, self.writers, cache)
        return self._pass(compute, position, remember, fresh, None, held, count)

    def step(
        self,
        weights: Sequence[Any],
        cache: Cache,
        x: Residual,
        compute: Compute,
        which: Bool[Array, " batch"] | None = None,
        given: Inputs | None = None,
    ) -> tuple[Residual, Cache]:
        """Read one token per row.

        weights: one entry per layer
        which: rows whose token is kept, in a cache from `Cache.by_row`; None for all rows

        Returns the residual stream after the last layer, and the updated cache. The bodies are
        returned unchanged: leave them out of a loop's carry.
        """
        position = cache.position()[:, None]
        more = 1 if which is None else which.astype(jnp.int32)

        remember = One(cache.length, cache.filled, which)
        added = jnp.broadcast_to(jnp.asarray(more), cache.length.shape)
        own = (self.bags, self.writers, cache)
        held = (memories(*own), added)
        run = self._pass(compute, position, remember, False, None, *held)
        x = run.all(weights, x, given)
        return x, replace(joined(*own, run.memories), filled=cache.filled + more)

    def fold(self, weights: Sequence[Any], cache: Cache) -> Cache:
        """Move the entries of the tails to the bodies. weights: one entry per layer."""
        added = jnp.broadcast_to(cache.filled, cache.length.shape)

        def folded(layer: ResolvedLayer, slot: Slot) -> Slot:
            attention, new = layer.softmax, dict(slot.tail)
            query = new.pop(QUERY, None)
            if query is not None:
                query = query.reshape(len(added), attention.key_heads, -1, *query.shape[2:])
            given = weights[layer.index]["read"], query, new, cache.length, added
            return extended(attention, False, slot, *given)

        layers = (layer for layer, _, _ in self.bags)
        slots = tuple(map(folded, layers, choosing(cache.slots, False)))
        return replace(
            cache, slots=slots, length=cache.length + added, filled=jnp.zeros_like(cache.filled)
        )


def _repeat(stacked: Any, repeat: int) -> Any:
    """Return the weights of one repeat of a layer."""
    return jax.tree.map(lambda leaf: leaf[repeat], stacked, is_leaf=is_compact)
