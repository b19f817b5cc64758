"""The interface of injections, which pass concepts to tokens.

An injection has weights that are used once per concept (`give`) and weights that are used once per
token (`own`), and methods for whole rows, prefill and a single step.
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
from mukv.core.params import map_params
from mukv.core.table import Component
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights
from mukv.model.auxiliary import Auxiliary
from mukv.model.concept.chunks import Chunks, ConceptOutputs
from mukv.model.stack import Stack

CONCEPT = "concept_"
"""Prefix of the names of dimensions at the width of concepts."""


def at_width(declared: Any) -> Any:
    """Return a tree of `Param` with the names that dimensions have at the width of concepts."""
    return map_params(lambda param: param.prefixed(CONCEPT), declared)


class Joint(NamedTuple):
    """Weights and parts that an injection uses.

    give: weights used once per concept
    own: weights used once per token
    decoder: local layers after the global ones
    layers: weights of these layers
    attention: attention by which tokens read concepts
    """

    give: Weights
    own: Weights
    decoder: Stack
    layers: Any
    attention: AnyAttention
    norm: RMSNorm
    compute: Compute


class InjectionInputs(NamedTuple):
    """Rows of tokens, and the outputs of their concepts.

    chunks: division of the rows into chunks
    outputs: outputs of the global layers
    before: output of the concept before the row's first one
    position: place of each token in its document
    segment: number of each token's document, never -1, which marks missing concepts
    """

    chunks: Chunks
    outputs: ConceptOutputs
    before: Float[Array, "batch concept_embed"]
    position: Int[Array, "batch token"]
    segment: Int[Array, "batch token"]

    def confidence(self) -> Float[Array, "batch token 1"]:
        """Return 1 for each token, with the gradient of the probability of its decision.

        The decision is whether a chunk ends. This straight-through estimator (H-Net, equation 8)
        lets training increase the probability of decisions that were useful. Without probabilities
        the gradient is zero.
        """
        chance, ends = self.chunks.wish.chance, self.chunks.ends
        if chance is None:
            return jnp.ones((*ends.shape, 1))
        sure = jnp.where(ends, chance, 1 - chance)
        return (1 + sure - jax.lax.stop_gradient(sure))[..., None]


class Lasting(NamedTuple):
    """The caches that an injection writes."""

    cross: Cache
    decoder: Cache


@dataclass(frozen=True)
class Injection(Component):
    """Base class of injections. By default the decoder reads the stream that `inject` returns."""

    @property
    def slots_per_concept(self) -> int:
        """Entries of the decoder's caches per concept, in addition to those of tokens."""
        return 0

    @property
    def remembers(self) -> bool:
        """Whether tokens attend to entries of concepts."""
        return False

    def check(self, layers: int) -> None:
        """Raise BadInput if the decoder has too few layers."""

    def give_params(
        self, d_model: int, concept: int, attention: AnyAttention, norm: RMSNorm
    ) -> dict[str, Any]:
        """Declare the weights used once per concept."""
        raise NotImplementedError

    def own_params(self, d_model: int, attention: AnyAttention, norm: RMSNorm) -> dict[str, Any]:
        """Declare the weights used once per token."""
        return {}

    def forward(
        self, joint: Joint, x: Residual, inputs: InjectionInputs, packed: bool
    ) -> tuple[Residual, Auxiliary]:
        """Run the decoder over whole rows with the concepts injected.

        packed: whether rows have several documents

        Returns the residual stream after the decoder, and its auxiliary numbers.
        """
        segment = inputs.segment if packed else None
        x = self.inject(joint, x, inputs)
        return joint.decoder.forward(joint.layers, x, inputs.position, segment, joint.compute)

    def inject(self, joint: Joint, x: Residual, inputs: InjectionInputs) -> Residual:
        """Return the stream with concepts added, for the decoder."""
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
        """Run the decoder over the first `count` tokens of each row.

        count, fresh: as in `Stack.prefill`
        """
        x = self.inject(joint, x, inputs)
        shared = (count, fresh, joint.compute)
        x, decoder = joint.decoder.prefill(joint.layers, cache.decoder, x, *shared)
        return x, cache._replace(decoder=decoder)

    def append_concept(
        self,
        joint: Joint,
        cache: Lasting,
        output: Float[Array, "batch concept_embed"],
        ends: Bool[Array, " batch"],
    ) -> Lasting:
        """Update the caches with a new concept, in the rows where `ends`.

        It is called before the decoder reads the chunk's last token, and only if a chunk ends in
        some row.
        """
        return cache

    def step(
        self,
        joint: Joint,
        cache: Lasting,
        x: Residual,
        output: Float[Array, "batch concept_embed"],
        count: Int[Array, " batch"],
    ) -> tuple[Residual, Lasting]:
        """Run the decoder on one token per row.

        output: output of the latest concept of each row
        count: number of concepts of its document
        """
        x, decoder = joint.decoder.step(joint.layers, cache.decoder, x, joint.compute)
        return x, cache._replace(decoder=decoder)
