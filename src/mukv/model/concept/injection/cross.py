"""Injection by cross-attention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp

from mukv.attention import AnyAttention, Attention, Bag, Entries, Mask
from mukv.cache import Reader
from mukv.core.norm import RMSNorm
from mukv.core.tap import scope
from mukv.core.typing import Array, Bool, Float, Int, Residual
from mukv.model.concept.injection.base import (
    Injection,
    InjectionInputs,
    Joint,
    Lasting,
    at_width,
)


@dataclass(frozen=True)
class Cross(Injection):
    """Cross-attention before the decoder: y = x + attention from a token to all earlier concepts.

    Its entries are one more layer of the concepts' cache.
    """

    kind: Literal["cross"] = "cross"

    @property
    def remembers(self) -> bool:
        return True

    def give_params(
        self, d_model: int, concept: int, attention: AnyAttention, norm: RMSNorm
    ) -> dict[str, Any]:
        own = {"norm": norm.params(concept), "write": attention.write_params(concept)}
        return at_width(own)

    def own_params(self, d_model: int, attention: AnyAttention, norm: RMSNorm) -> dict[str, Any]:
        return {"norm": norm.params(d_model), "read": attention.read_params(d_model)}

    def _written(self, joint: Joint, outputs: Array, position: Array) -> dict[str, Array]:
        """Compute the entries of concepts."""
        normed = joint.norm.apply(joint.give["norm"], outputs)
        return joint.attention.write(joint.give["write"], normed, position)

    def _read(
        self,
        joint: Joint,
        x: Residual,
        count: Int[Array, "batch token"],
        parts: tuple[Bag, ...],
        segment: Int[Array, "batch token"] | None = None,
    ) -> Residual:
        """Attend from tokens to concepts.

        count: number of concepts that each token sees: those at positions up to count - 1
        """
        # A token that follows n concepts sees positions up to n - 1.
        normed = joint.norm.apply(joint.own["norm"], x)
        # Taps name it as the layer before the decoder's first one.
        with scope(f"layer{joint.decoder.first - 1}"):
            mask = Mask(segment=segment)
            read, _ = joint.attention.read(
                joint.own["read"], normed, count - 1, parts, mask, joint.compute
            )
        return read

    def inject(self, joint: Joint, x: Residual, inputs: InjectionInputs) -> Residual:
        chunks = inputs.chunks
        position = chunks.at_ends(chunks.made) - 1
        segment = chunks.at_ends(inputs.segment, -1)
        written = self._written(joint, inputs.outputs, position)
        entries = Entries(written, position[:, None], segment=segment[:, None])
        read = self._read(joint, x, chunks.made, (entries,), inputs.segment)
        return x + read * inputs.confidence().astype(x.dtype)

    def prefill(
        self,
        joint: Joint,
        cache: Lasting,
        x: Residual,
        inputs: InjectionInputs,
        count: Int[Array, " batch"],
        fresh: bool,
    ) -> tuple[Residual, Lasting]:
        assert isinstance(joint.attention, Attention)
        chunks, (slot,) = inputs.chunks, cache.cross.slots
        position = cache.cross.length[:, None] + jnp.arange(chunks.end.shape[1])[None]
        written = self._written(joint, inputs.outputs, position)
        new = Entries(written, position[:, None])
        parts = (new,) if fresh else (slot.entries(cache.cross.length), new)
        x = x + self._read(joint, x, chunks.made, parts)
        reader = Reader(joint.attention, joint.own["read"])
        slot = slot.extended(written, cache.cross.length, chunks.total, reader, fresh)
        length = cache.cross.length + chunks.total
        after = replace(cache.cross, slots=(slot,), length=length)
        shared = (count, fresh, joint.compute)
        x, decoder = joint.decoder.prefill(joint.layers, cache.decoder, x, *shared)
        return x, Lasting(after, decoder)

    def append_concept(
        self,
        joint: Joint,
        cache: Lasting,
        output: Float[Array, "batch concept_embed"],
        ends: Bool[Array, " batch"],
    ) -> Lasting:
        (slot,), cross = cache.cross.slots, cache.cross
        written = self._written(joint, output[:, None], cross.position()[:, None])
        slot = slot.appended(written, cross.length, cross.filled, ends)
        return cache._replace(cross=replace(cross, slots=(slot,), filled=cross.filled + ends))

    def step(
        self,
        joint: Joint,
        cache: Lasting,
        x: Residual,
        output: Float[Array, "batch concept_embed"],
        count: Int[Array, " batch"],
    ) -> tuple[Residual, Lasting]:
        (slot,), cross = cache.cross.slots, cache.cross
        parts = slot.bag(cross.length), slot.newest(cross.length, cross.filled)
        x = x + self._read(joint, x, count[:, None], parts)
        return super().step(joint, cache, x, output, count)
