"""The concept model: local layers over tokens, global layers over one concept per chunk.

Windowed layers encode tokens. A chunker divides them into chunks, pooling reduces each chunk to a
vector, the concept, and the global layers process the concepts. An injection passes each concept to
the last token of its chunk and all later tokens, which more windowed layers process. The cache
grows with the number of concepts, not of tokens. Training minimises the cross-entropy plus the
ratio loss of a learned chunker. The model follows Block Transformer (Ho et al. 2024), SpaceByte
(Slagle 2024) and H-Net (Hwang et al. 2025).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

from mukv.cache import FULL, Cache, Calibrated, Policy
from mukv.core.compute import Compute, settled
from mukv.core.linear import project
from mukv.core.typing import Array, Float, Int, Residual, Tokens, Weights
from mukv.model.auxiliary import PENALTY, over_layers
from mukv.model.base import ForwardResult
from mukv.model.cache_update import compressed
from mukv.model.concept.architecture import Architecture
from mukv.model.concept.cache import ConceptCache
from mukv.model.concept.chunks import (
    Chunks,
    ChunkState,
    ConceptOutputs,
    chunked,
    smoothed,
    state_after,
    windows,
)
from mukv.model.concept.injection import (
    InjectionInputs,
    Lasting,
)
from mukv.model.empty_cache import empty_cache
from mukv.model.evicting import AnyThrough
from mukv.model.policy_check import check_policy
from mukv.model.rates import Capacity
from mukv.model.stack import Stack


@dataclass(frozen=True)
class Concept(Architecture):
    """Model whose global layers run once per chunk of tokens; see `Architecture`."""

    kind: Literal["concept"] = "concept"

    cache_class: ClassVar[type[Any]] = ConceptCache

    # Whole rows

    def forward(
        self,
        weights: Weights,
        tokens: Tokens,
        position: Int[Array, "batch token"] | None = None,
        segment: Int[Array, "batch token"] | None = None,
        compute: Compute | None = None,
        through: AnyThrough | None = None,
    ) -> ForwardResult:
        compute = settled(compute)
        outer = self.outer(weights, compute)
        here = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        position = here if position is None else position
        documents = jnp.ones_like(tokens) if segment is None else segment
        first = jnp.pad(documents[:, 1:] != documents[:, :-1], ((0, 0), (1, 0)))
        first = first | (here == 0)
        place = here - jax.lax.cummax(jnp.where(first, here, 0), axis=1)

        x = self.embed(weights, tokens, compute)
        local = (position, segment, compute)
        x, first_reported = self.encoder_stack.forward(weights.get("encoder", {}), x, *local)
        state = self.start(len(tokens), x.dtype)
        room = max(1, tokens.shape[1] // self.chunker.pace)
        shared = (first, place, here >= 0, state, jnp.zeros_like(tokens[:, 0]), room)
        chunks = chunked(self.chunker, outer["chunker"], tokens, x, *shared)
        count = chunks.at_ends(chunks.made, 1)
        outputs, reported = self.global_stack.forward(
            weights["concepts"],
            self._pooled(outer["pool"], chunks, x, state),
            count - 1,
            chunks.at_ends(documents, -1),
            compute,
        )
        outputs = self._smoothed(chunks, outputs, state)
        inputs = InjectionInputs(chunks, outputs, state.output, position, documents)
        joint = self.joint(outer, weights.get("decoder", {}), compute)
        packed = segment is not None
        x, last_reported = self.injection.forward(joint, x, inputs, packed)
        made = jnp.sum(chunks.ends, axis=1).astype(jnp.float32)
        penalty = self.chunker.penalty(chunks.ends, chunks.wish)
        own = {} if penalty is None else {PENALTY: penalty}
        auxiliary = over_layers([first_reported, reported, last_reported, own])
        result = self.result(weights, x, auxiliary, tokens.shape[1])
        counts = {"concepts_per_token": made, "refused_borders_per_token": chunks.refused()}
        return result._replace(counts={**result.counts, **counts})

    def _pooled(
        self, weights: Weights, chunks: Chunks, x: Residual, state: ChunkState
    ) -> ConceptOutputs:
        """Pool the tokens of each chunk and project to the width of concepts."""
        window, present = windows(chunks, x, state.recent)
        return project(self.pool.apply(weights, window, present), weights["enter"])

    def _smoothed(
        self, chunks: Chunks, outputs: ConceptOutputs, state: ChunkState
    ) -> ConceptOutputs:
        """Mix each concept whose end is uncertain with the previous concept. Without probabilities
        of ends the outputs are returned unchanged.
        """
        if chunks.wish.chance is None:
            return outputs
        chance = chunks.at_ends(chunks.wish.chance, 1.0)
        return smoothed(outputs, chance, chunks.at_ends(chunks.made) == 1, state.output)

    # Decoding

    @property
    def policy_stack(self) -> Stack:
        return self.global_stack

    def empty_cache(
        self,
        batch: int,
        length: int,
        tail: int = 64,
        dtype: jnp.dtype | None = None,
        policy: Policy = FULL,
        centres: Calibrated | None = None,
        after: int | None = None,
    ) -> ConceptCache:
        """Allocate an empty cache; the policy applies to the global layers.

        See `LanguageModel.empty_cache`.
        """
        dtype = dtype or settled(None).type
        check_policy(self.global_stack, policy)
        first = self.global_stack.first
        own = {layer - first: each for layer, each in (centres or {}).items()}
        applied = {"policy": policy, "centres": own, "after": after}

        def empty(each: Capacity) -> Cache:
            own = applied if each.stack is self.global_stack else {}
            cache = empty_cache(each.stack, batch, each.length, each.tail, dtype, **own)
            return cache.by_row() if each.by_row else cache

        encoder, concepts, cross, decoder = map(empty, self.capacities(length, tail))
        return ConceptCache(encoder, concepts, cross, decoder, self.start(batch, dtype))

    def prefill(
        self,
        weights: Weights,
        cache: ConceptCache,
        tokens: Tokens,
        count: Int[Array, " batch"],
        fresh: bool = True,
        compute: Compute | None = None,
    ) -> tuple[Float[Array, "batch vocab"], ConceptCache]:
        compute = settled(compute)
        outer, state = self.outer(weights, compute), cache.state
        here = jnp.arange(tokens.shape[1])[None]
        place = cache.length[:, None] + here
        x = self.embed(weights, tokens, compute)
        rest = (count, fresh, compute)
        x, encoder = self.encoder_stack.prefill(weights["encoder"], cache.encoder, x, *rest)
        pace = self.chunker.pace
        room = max(1, tokens.shape[1] // pace) if fresh else self.chunker.burst(tokens.shape[1])
        shared = (place == 0, place, here < count[:, None], state, cache.concepts.length, room)
        chunks = chunked(self.chunker, outer["chunker"], tokens, x, *shared)
        rest = (chunks.total, fresh, compute)
        outputs, concepts = self.global_stack.prefill(
            weights["concepts"],
            cache.concepts,
            self._pooled(outer["pool"], chunks, x, state),
            *rest,
        )
        outputs = self._smoothed(chunks, outputs, state)
        inputs = InjectionInputs(chunks, outputs, state.output, place, jnp.zeros_like(tokens))
        joint = self.joint(outer, weights["decoder"], compute)
        lasting = Lasting(cache.cross, cache.decoder)
        y, lasting = self.injection.prefill(joint, lasting, x, inputs, count, fresh)
        after = ConceptCache(
            encoder, concepts, *lasting, state_after(chunks, x, outputs, state, count)
        )
        return self.read_out(weights, y, compute, count - 1)[:, 0], after

    def step(
        self,
        weights: Weights,
        cache: ConceptCache,
        token: Int[Array, " batch"],
        compute: Compute | None = None,
    ) -> tuple[Float[Array, "batch vocab"], ConceptCache]:
        """Read one token per row, as `LanguageModel.step`.

        The global layers only run if a chunk ends in some row.
        """
        compute = settled(compute)
        outer, state = self.outer(weights, compute), cache.state
        joint = self.joint(outer, weights["decoder"], compute)
        place = cache.encoder.position()[:, None]
        x = self.embed(weights, token[:, None], compute)
        x, encoder = self.encoder_stack.step(weights["encoder"], cache.encoder, x, compute)
        earlier = cache.concepts.position()
        shared = (place == 0, place, place >= 0, state, earlier, 1)
        chunks = chunked(self.chunker, outer["chunker"], token[:, None], x, *shared)
        ends, lasting = chunks.ends[:, 0], Lasting(cache.cross, cache.decoder)

        def run_global_layers() -> Any:
            pooled = self._pooled(outer["pool"], chunks, x, state)
            made, concepts = self.global_stack.step(
                weights["concepts"], cache.concepts, pooled, compute, ends
            )
            made = self._smoothed(chunks, made, state)[:, 0].astype(state.output.dtype)
            output = jnp.where(ends[:, None], made, state.output)
            noted = self.injection.append_concept(joint, lasting, output, ends)
            return output, [part.split()[1] for part in (concepts, *noted)]

        def keep_output() -> Any:
            return state.output, [part.split()[1] for part in (cache.concepts, *lasting)]

        # lax.cond copies what its branches return, so they return tails and not bodies.
        output, tails = jax.lax.cond(jnp.any(ends), run_global_layers, keep_output)
        concepts, *noted = (
            type(part).join(part.split()[0], tail)
            for part, tail in zip((cache.concepts, *lasting), tails, strict=True)
        )
        y, lasting = self.injection.step(joint, Lasting(*noted), x, output, earlier + ends)
        state = state_after(chunks, x, output[:, None], state, jnp.ones_like(earlier))
        after = ConceptCache(encoder, concepts, *lasting, state)
        return self.read_out(weights, y, compute)[:, 0], after

    def fold(self, weights: Weights, cache: ConceptCache) -> ConceptCache:
        read = [{"read": weights.get("injection", {}).get("read", {})}]
        return ConceptCache(
            self.encoder_stack.fold(weights["encoder"], cache.encoder),
            self.global_stack.fold(weights["concepts"], cache.concepts),
            self.cross.fold(read, cache.cross),
            self.decoder_stack.fold(weights["decoder"], cache.decoder),
            cache.state,
        )

    def compressed(
        self, weights: Weights, recorded: ConceptCache, empty: ConceptCache
    ) -> ConceptCache:
        """Apply a policy to the global layers; the other caches are equal under all policies."""
        own = weights["concepts"], recorded.concepts, empty.concepts
        return replace(recorded, concepts=compressed(self.global_stack.bags, *own))
