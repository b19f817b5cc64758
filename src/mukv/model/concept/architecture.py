"""The parts of a concept model: configuration, stacks, weights and cache sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import jax.numpy as jnp

from mukv.attention import AnyAttention
from mukv.core.compute import Compute
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.params import WIDEST, Param
from mukv.core.partition import gather
from mukv.core.typing import Weights
from mukv.model.base import LanguageModel
from mukv.model.concept.chunkers import AnyChunker, Delimiter
from mukv.model.concept.chunks import ChunkState
from mukv.model.concept.injection import (
    CONCEPT,
    AnyInjection,
    Joint,
    ResidualInjection,
    at_width,
)
from mukv.model.concept.pooling import AnyPool, SelectPool
from mukv.model.feedforward import AnyFeedforward
from mukv.model.plan import Layer, Stage
from mukv.model.rates import Capacity, StackRate
from mukv.model.stack import Stack

LOCAL = (Stage((Layer(window=64),)),)
"""Default plan of the local layers: one layer with a window of 64 tokens."""


@dataclass(frozen=True)
class Concepts:
    """Configuration of the global layers.

    d_model: width of concepts; that of the local layers if None
    attention: attention of the global layers; that of the model if None
    mlp: feed-forward part of the global layers; that of the model if None
    plan: stages of layers
    """

    d_model: int | None = None
    attention: AnyAttention | None = None
    mlp: AnyFeedforward | None = None
    plan: tuple[Stage, ...] = (Stage(),)

    grows: ClassVar[tuple[str, ...]] = ("d_model",)

    def __post_init__(self) -> None:
        require_counts(self, "d_model", most=WIDEST)
        if not self.plan:
            raise BadInput("plan", [], "at least one stage")


@dataclass(frozen=True)
class Architecture(LanguageModel):
    """Local layers over tokens before and after global layers over concepts, one vector per chunk.

    encoder: local layers before the global ones, each with a window or a state; may be empty
    chunker: rule by which chunks of tokens end
    pool: reduction of the tokens of a chunk to one vector
    concepts: the global layers
    injection: how later tokens use concepts
    decoder: local layers after the global ones, each with a window or a state; may be empty
    """

    encoder: tuple[Stage, ...] = LOCAL
    chunker: AnyChunker = field(default_factory=Delimiter)
    pool: AnyPool = field(default_factory=SelectPool)
    concepts: Concepts = field(default_factory=Concepts)
    injection: AnyInjection = field(default_factory=ResidualInjection)
    decoder: tuple[Stage, ...] = LOCAL

    def __post_init__(self) -> None:
        for name, stack in (("encoder", self.encoder_stack), ("decoder", self.decoder_stack)):
            for layer in stack.layers:
                if layer.bags and (layer.window is None or layer.window < self.chunker.pace):
                    raise BadInput(
                        name,
                        f"window {layer.window}",
                        f"local layer {layer.index} needs a window of at least a chunk "
                        f"({self.chunker.pace} tokens)",
                    )
        self.chunker.check(self.vocab_size)
        self.pool.check(self.d_model, self.reach)
        self.injection.check(len(self.decoder_stack.layers))
        if self.injection.remembers and [*self.reader.stores()] != [*self.reader.bags][:1]:
            raise BadInput(
                "injection",
                self.injection.kind,
                f"residual or prefix: {self.reader.kind} has several stores or a state",
            )
        super().__post_init__()

    def check_tokenizer(self, vocab_size: int) -> None:
        self.chunker.check(vocab_size)

    # Parts

    @property
    def width(self) -> int:
        """Width of concepts."""
        return self.concepts.d_model or self.d_model

    @property
    def reach(self) -> int:
        """Maximum number of tokens that a concept is computed from."""
        return self.pool.reach(self.chunker.reach)

    @cached_property
    def encoder_stack(self) -> Stack:
        """The local layers before the global ones."""
        return self.stack_of(self.encoder)

    @cached_property
    def global_stack(self) -> Stack:
        """The global layers."""
        return Stack(
            self.width,
            self.concepts.attention or self.attention,
            self.concepts.mlp or self.mlp,
            self.concepts.plan,
            *(self.norm, self.residual, self.scaling.at_width(CONCEPT)),
            first=len(self.encoder_stack.layers),
        )

    @cached_property
    def cross(self) -> Stack:
        """One layer whose entries tokens read by cross-attention; empty for other injections."""
        return Stack(
            self.width,
            *(self.attention, self.mlp, (Stage(),) if self.injection.remembers else ()),
            *(self.norm, self.residual, self.scaling),
            first=self.global_stack.first + len(self.global_stack.layers),
        )

    @cached_property
    def decoder_stack(self) -> Stack:
        """The local layers after the global ones."""
        return self.stack_of(self.decoder, self.cross.first + len(self.cross.layers))

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        return self.encoder_stack, self.global_stack, self.cross, self.decoder_stack

    @property
    def rates(self) -> tuple[StackRate, ...]:
        pace = self.chunker.pace
        return StackRate(), StackRate(pace, pace), StackRate(entry=pace), StackRate()

    @property
    def reader(self) -> AnyAttention:
        """Attention by which tokens read concepts."""
        return self.cross.layers[0].attention if self.cross.layers else self.attention

    # Weights

    def body_params(self) -> dict[str, Any]:
        shared = (self.reader, self.norm)
        enter = {"embed": self.d_model, f"{CONCEPT}embed": self.width}
        pool = self.pool.params(self.d_model, self.reach)
        declared = {
            "encoder": self.encoder_stack.params(),
            "chunker": self.chunker.params(self.d_model),
            "pool": {**pool, "enter": Param(enter, fan_in=("embed",))},
            "concepts": at_width(self.global_stack.params()),
            "give": self.injection.give_params(self.d_model, self.width, *shared),
            "injection": self.injection.own_params(self.d_model, *shared),
            "decoder": self.decoder_stack.params(),
        }
        return {name: tree for name, tree in declared.items() if tree}

    def unstack(self, weights: Weights) -> dict[str, Any]:
        stacks = {
            "encoder": self.encoder_stack,
            "concepts": self.global_stack,
            "decoder": self.decoder_stack,
        }
        layers = {name: stack.unstack(weights.get(name, {})) for name, stack in stacks.items()}
        return {**weights, **layers}

    def tokens_per_use(self, part: str) -> int:
        return self.chunker.pace if part in ("pool", "concepts", "give") else 1

    def outer(self, weights: Weights, compute: Compute) -> dict[str, Any]:
        """Return the weights outside of all layers, gathered and rounded to the type of
        operands.
        """
        names = ("chunker", "pool", "give", "injection")
        declared = {name: tree for name, tree in self.body_params().items() if name in names}
        own = compute.working_copy(declared, {name: weights[name] for name in declared})
        return {"chunker": {}, "injection": {}, **gather(own, declared)}

    def joint(self, outer: Weights, layers: Any, compute: Compute) -> Joint:
        """Collect the weights and parts that an injection needs.

        layers: weights of the decoder's layers
        """
        parts = (self.decoder_stack, layers, self.reader, self.norm, compute)
        return Joint(outer["give"], outer["injection"], *parts)

    # Cache sizes

    def capacities(self, length: int, tail: int) -> tuple[Capacity, ...]:
        concepts, more = max(1, length // self.chunker.pace), self.chunker.burst(tail)
        slots = self.injection.slots_per_concept
        local = (length + slots * concepts, tail + slots * more, slots > 0)
        return (
            Capacity(self.encoder_stack, length, tail),
            Capacity(self.global_stack, concepts, more, by_row=True),
            Capacity(self.cross, concepts, more, by_row=True),
            Capacity(self.decoder_stack, *local),
        )

    def state_bytes(self, dtype: jnp.dtype) -> int:
        vectors = self.chunker.mark_width(self.d_model) + self.width
        return dtype.itemsize * (vectors + (self.reach - 1) * self.d_model) + 4

    def start(self, batch: int, dtype: jnp.dtype) -> ChunkState:
        """Return the chunk state before the first token: zeros."""
        return ChunkState(
            mark=jnp.zeros((batch, self.chunker.mark_width(self.d_model)), dtype),
            recent=jnp.zeros((batch, self.reach - 1, self.d_model), dtype),
            inside=jnp.zeros(batch, jnp.int32),
            output=jnp.zeros((batch, self.width), dtype),
        )
