"""Injection by additional entries in the decoder's sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from mukv.attention import AnyAttention
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.norm import RMSNorm
from mukv.core.params import Param
from mukv.core.typing import Array, Bool, Float, Int, Residual
from mukv.model.auxiliary import Auxiliary
from mukv.model.concept.chunks import gathered
from mukv.model.concept.injection.base import CONCEPT, Injection, InjectionInputs, Joint, Lasting


@dataclass(frozen=True)
class Prefix(Injection):
    """Each concept enters the decoder as `slots` entries before the token that ended its chunk.

    slots: entries per concept

    This follows Block Transformer (Ho et al. 2024); windows count these entries.
    """

    kind: Literal["prefix"] = "prefix"
    slots: int = 2

    def __post_init__(self) -> None:
        require_counts(self, "slots", most=1 << 16)

    @property
    def slots_per_concept(self) -> int:
        return self.slots

    def check(self, layers: int) -> None:
        if not layers:
            raise BadInput(
                "decoder", [], "at least one layer, since only decoder layers read a prefix"
            )

    def give_params(
        self, d_model: int, concept: int, attention: AnyAttention, norm: RMSNorm
    ) -> dict[str, Any]:
        dims = {f"{CONCEPT}embed": concept, "slot": self.slots, "embed": d_model}
        return {"give": Param(dims, fan_in=(f"{CONCEPT}embed",))}

    def _interleaved(
        self, joint: Joint, x: Residual, inputs: InjectionInputs
    ) -> tuple[Array, Array, Array]:
        """Insert the entries of concepts between tokens.

        Returns the sequence, the index in (tokens, entries) that each of its places comes from, and
        the place of each token.
        """
        chunks, slots = inputs.chunks, self.slots
        batch, length = x.shape[:2]
        entries = project(inputs.outputs, joint.give["give"])
        sure = chunks.at_ends(inputs.confidence()).astype(x.dtype)
        entries = (entries * sure[:, :, None]).reshape(batch, -1, x.shape[-1])
        vectors = jnp.concatenate([x, entries], axis=1)
        total = vectors.shape[1]
        token = jnp.arange(length)[None] + slots * chunks.number
        concept = jnp.arange(chunks.end.shape[1])[None, :, None]
        slot = chunks.end[..., None] + slots * concept + jnp.arange(slots)[None, None]
        slot = jnp.where(chunks.end[..., None] < length, slot, total).reshape(batch, -1)
        rows = jnp.arange(batch)[:, None]
        origin = jnp.full((batch, total), total)
        origin = origin.at[rows, jnp.concatenate([token, slot], axis=1)].set(
            jnp.broadcast_to(jnp.arange(total), (batch, total)), mode="drop"
        )
        return gathered(vectors, origin), origin, token

    def forward(
        self, joint: Joint, x: Residual, inputs: InjectionInputs, packed: bool
    ) -> tuple[Residual, Auxiliary]:
        stream, origin, token = self._interleaved(joint, x, inputs)
        chunks, slots = inputs.chunks, self.slots

        def joined(values: Array, of_slots: Array) -> Array:
            of_slots = of_slots.reshape(len(values), -1)
            return jnp.concatenate([values, of_slots], axis=1)

        own = inputs.position + slots * chunks.made
        ends = chunks.at_ends(own)[..., None] - slots + jnp.arange(slots)[None, None]
        segments = jnp.repeat(chunks.at_ends(inputs.segment, -1), slots, axis=1)
        out, auxiliary = joint.decoder.forward(
            joint.layers,
            stream,
            gathered(joined(own, ends), origin),
            gathered(joined(inputs.segment, segments), origin, -1),
            joint.compute,
        )
        return gathered(out, token), auxiliary

    def prefill(
        self,
        joint: Joint,
        cache: Lasting,
        x: Residual,
        inputs: InjectionInputs,
        count: Int[Array, " batch"],
        fresh: bool,
    ) -> tuple[Residual, Lasting]:
        stream, _, token = self._interleaved(joint, x, inputs)
        shared = (count + self.slots * inputs.chunks.total, fresh, joint.compute)
        out, decoder = joint.decoder.prefill(joint.layers, cache.decoder, stream, *shared)
        return gathered(out, token), cache._replace(decoder=decoder)

    def append_concept(
        self,
        joint: Joint,
        cache: Lasting,
        output: Float[Array, "batch concept_embed"],
        ends: Bool[Array, " batch"],
    ) -> Lasting:
        entries = project(output, joint.give["give"])
        decoder = cache.decoder
        for slot in range(self.slots):
            x = entries[:, slot, None]
            _, decoder = joint.decoder.step(joint.layers, decoder, x, joint.compute, ends)
        return cache._replace(decoder=decoder)

    def step(
        self,
        joint: Joint,
        cache: Lasting,
        x: Residual,
        output: Float[Array, "batch concept_embed"],
        count: Int[Array, " batch"],
    ) -> tuple[Residual, Lasting]:
        every = jnp.ones(len(x), bool)
        x, decoder = joint.decoder.step(joint.layers, cache.decoder, x, joint.compute, every)
        return x, cache._replace(decoder=decoder)
