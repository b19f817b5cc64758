"""How tokens hear of concepts: the contract.

An injection says what each concept gives (`give` weights, used once per concept) and what each
token does with it (`own` weights), for whole rows, a prefill and a single step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mukv.attention import AnyAttention
from mukv.cache import Cache
from mukv.core.compute import Compute
from mukv.core.norm import RMSNorm
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights
from mukv.model.auxiliary import Auxiliary
from mukv.model.concept.chunks import Chunks, ConceptOutputs
from mukv.model.stack import Stack

CONCEPT = "concept_"
"""Prefix of the names of dimensions at the width of concepts."""


class Joint(NamedTuple):
    """What an injection works with. layers: weights of the decoder. attention: what tokens read
    concepts with."""

    give: Weights
    own: Weights
    decoder: Stack
    layers: Any
    attention: AnyAttention
    norm: RMSNorm
    compute: Compute


class InjectionInputs(NamedTuple):
    """Rows of tokens and what became of their concepts. before: the output that a row begins with.
    segment: document of each token, -1 nowhere."""

    chunks: Chunks
    outputs: ConceptOutputs
    before: Float[Array, "batch concept_embed"]
    position: Int[Array, "batch token"]
    segment: Int[Array, "batch token"]

    def confidence(self) -> Float[Array, "batch token 1"]:
        """One, whose gradient makes borders surer where what they gave was of use (H-Net, equation
        8); without a chance just one."""
        chance, ends = self.chunks.wish.chance, self.chunks.ends
        if chance is None:
            return jnp.ones((*ends.shape, 1))
        sure = jnp.where(ends, chance, 1 - chance)
        return (1 + sure - jax.lax.stop_gradient(sure))[..., None]


class Lasting(NamedTuple):
    """The parts of a cache that an injection writes."""

    cross: Cache
    decoder: Cache


@dataclass(frozen=True)
class Injection:
    """The contract; by default the decoder reads a stream that `inject` made."""

    @property
    def slots_per_concept(self) -> int:
        """Entries of the decoder that are none of a token."""
        return 0

    @property
    def remembers(self) -> bool:
        """Whether tokens read entries of concepts."""
        return False

    def check(self, layers: int) -> None:
        """Raise BadInput where so many local layers after it are too few."""

    def give_params(
        self, d_model: int, concept: int, attention: AnyAttention, norm: RMSNorm
    ) -> dict[str, Any]:
        """Weights used once per concept."""
        raise NotImplementedError

    def own_params(self, d_model: int, attention: AnyAttention, norm: RMSNorm) -> dict[str, Any]:
        """Weights used once per token."""
        return {}

    def forward(
        self, joint: Joint, x: Residual, inputs: InjectionInputs, packed: bool
    ) -> tuple[Residual, Auxiliary]:
        """Whole rows: the stream after the decoder, and what its layers report. packed: rows have
        several documents."""
        segment = inputs.segment if packed else None
        x = self.inject(joint, x, inputs)
        return joint.decoder.forward(joint.layers, x, inputs.position, segment, joint.compute)

    def inject(self, joint: Joint, x: Residual, inputs: InjectionInputs) -> Residual:
        raise NotImplementedError

    def prefill(
        self,
        joint: Joint,
        cache: Lasting,
        x: Residual,
        inputs: InjectionInputs,
        count: Int[Array, " batch"],
        fresh: bool,
    ) -> tuple[Residual, Lasting]:
        x = self.inject(joint, x, inputs)
        shared = (count, fresh, joint.compute)
        x, decoder = joint.decoder.prefill(joint.layers, cache.decoder, x, *shared)
        return x, cache._replace(decoder=decoder)

    def note(
        self,
        joint: Joint,
        cache: Lasting,
        output: Float[Array, "batch concept_embed"],
        ends: Bool[Array, " batch"],
    ) -> Lasting:
        """The cache after a concept of the rows where a chunk ends, before that chunk's last token
        goes on. Only called if there is one."""
        return cache

    def step(
        self,
        joint: Joint,
        cache: Lasting,
        x: Residual,
        output: Float[Array, "batch concept_embed"],
        count: Int[Array, " batch"],
    ) -> tuple[Residual, Lasting]:
        """One token per row. output, count: of the latest concept of each row's document."""
        x, decoder = joint.decoder.step(joint.layers, cache.decoder, x, joint.compute)
        return x, cache._replace(decoder=decoder)
