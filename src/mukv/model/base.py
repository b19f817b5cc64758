"""What every model has: an embedding, something between, a readout; and what it is asked.

The model is its configuration; weights are a tree that it declares and is given back. Training,
evaluation, decoding and everything after know a model by this contract alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp

from mukv.attention import AnyAttention, Grouped
from mukv.cache import FULL, Cache, Calibrated, Policy
from mukv.core.compute import Compute, settled
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.mesh import constrain
from mukv.core.norm import RMSNorm
from mukv.core.params import WIDEST, Param
from mukv.core.tap import tap
from mukv.core.typing import Array, Float, Int, Residual, Tokens, Weights
from mukv.model.auxiliary import PENALTY, Auxiliary
from mukv.model.block import AnyResidual, Gated, PreNorm
from mukv.model.feedforward import AnyFeedforward
from mukv.model.plan import ResolvedLayer, Stage
from mukv.model.stack import Stack
from mukv.scaling.parameterization import Scaling
from mukv.scaling.stability import Family


class Memory(NamedTuple):
    """What a stack is given to remember in: entries a row in the bodies, and in the tails; by_row:
    rows go on at steps of their own."""

    stack: Stack
    length: int
    tail: int
    by_row: bool = False


class ForwardResult(NamedTuple):
    """What a forward pass gives. hidden: the residual stream after the last layer and norm.
    penalty: what training minimises besides the cross-entropy, in nats per token of each row; None
    for nothing. counts: numbers to be reported, summed over the row; a run logs them per token.
    """

    hidden: Residual
    penalty: Float[Array, " batch"] | None = None
    counts: dict[str, Float[Array, " batch"]] = {}  # noqa: RUF012 (never changed)


@dataclass(frozen=True)
class LanguageModel:
    """The contract; fields are the YAML keys.

    vocab_size: at least the tokenizer's. attention, mlp: those of layers that name none.
    residual: where the norms stand. embedding_scale: "root_width" multiplies embeddings by the
    root of their width. readout: weights of its own, or the embedding's. logit_softcap: bound of
    the logits, by tanh. context: the longest sequence that the model is meant for; None if
    nothing limits it.
    """

    kind: str = ""
    vocab_size: int = 264
    d_model: int = 128
    attention: AnyAttention = field(default_factory=Grouped)
    mlp: AnyFeedforward = field(default_factory=Gated)
    norm: RMSNorm = field(default_factory=RMSNorm)
    residual: AnyResidual = field(default_factory=PreNorm)
    embedding_scale: Literal["root_width"] | None = None
    readout: Literal["linear", "tied"] = "linear"
    logit_softcap: float | None = None
    context: int | None = None
    scaling: Scaling = field(default_factory=Scaling)

    grows: ClassVar[tuple[str, ...]] = ("d_model",)
    """Fields that go with the width of the model."""
    cache_class: ClassVar[type[Any]] = Cache
    """Has `split`, `join`, `nbytes`, `filled` and `tail_size`, as `Cache` does."""

    def __post_init__(self) -> None:
        require_counts(self, "d_model", most=WIDEST)
        require_counts(self, "vocab_size", most=1 << 26)
        require_counts(self, "context")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise BadInput("logit_softcap", self.logit_softcap, "greater than 0, or null")
        self.scaling.check(self.params())
        self.residual.check(self.norm, self.scaling)

    # What a model answers

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """Its layers, by width and memory."""
        raise NotImplementedError

    def body_params(self) -> dict[str, Any]:
        """The weights between embedding and readout."""
        raise NotImplementedError

    def unstack(self, weights: Weights) -> dict[str, Any]:
        """The same weights with one entry per layer: what decoding takes, so that no step slices a
        stack."""
        raise NotImplementedError

    def forward(
        self,
        weights: Weights,
        tokens: Tokens,
        position: Int[Array, "batch token"] | None = None,
        segment: Int[Array, "batch token"] | None = None,
        compute: Compute | None = None,
    ) -> ForwardResult:
        """One forward pass, weights scaled and stacked.

        position: place in the document, counted from 0 (default: place in the row). segment:
        number of the document from 1, 0 for padding; tokens see only their own (default: one per
        row).
        """
        raise NotImplementedError

    def empty_cache(
        self,
        batch: int,
        length: int,
        tail: int = 64,
        dtype: jnp.dtype | None = None,
        policy: Policy = FULL,
        centres: Calibrated | None = None,
    ) -> Any:
        """Room for `length` tokens a row, and for `tail` more before `fold` is called.

        policy: of what layers without a window keep, store and read. centres: calibrated ones,
        by layer. Raises BadInput for a policy that does not fit.
        """
        raise NotImplementedError

    def prefill(
        self,
        weights: Weights,
        cache: Any,
        tokens: Tokens,
        count: Int[Array, " batch"],
        fresh: bool = True,
        compute: Compute | None = None,
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """Read `count` tokens of each row at once; logits of what follows, and the cache.

        weights: unstacked. tokens: padded behind. The tail must be empty. fresh: the cache is
        known to be empty, so that only the new tokens are read.
        """
        raise NotImplementedError

    def step(
        self,
        weights: Weights,
        cache: Any,
        token: Int[Array, " batch"],
        compute: Compute | None = None,
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """Read one token per row: logits of what follows, and the cache, one token fuller.

        weights: unstacked. What a cache's `split` calls frozen comes back as it is.
        """
        raise NotImplementedError

    def fold(self, weights: Weights, cache: Any) -> Any:
        """Move the tails into the bodies. weights: unstacked; a policy judges entries by them."""
        raise NotImplementedError

    # What most answer alike

    def check_tokenizer(self, vocab_size: int) -> None:
        """Raise BadInput where the model names tokens that a tokenizer of this size lacks."""

    def memories(self, length: int, tail: int) -> tuple[Memory, ...]:
        """What `empty_cache` has for these numbers of tokens."""
        return tuple(Memory(stack, length, tail) for stack in self.stacks)

    def state_bytes(self, dtype: jnp.dtype) -> int:
        """Bytes a row of what decoding keeps besides."""
        return 0

    def every(self, part: str) -> int:
        """Tokens, at least, that one use of the weights under this name is for."""
        return 1

    # What all have in common

    @cached_property
    def layers(self) -> tuple[ResolvedLayer, ...]:
        """Every layer, in order."""
        return tuple(layer for stack in self.stacks for layer in stack.layers)

    def stack_of(self, plan: tuple[Stage, ...], first: int = 0) -> Stack:
        """These layers at the model's own width. first: number of the first of them."""
        shared = (self.norm, self.residual, self.scaling)
        return Stack(self.d_model, self.attention, self.mlp, plan, *shared, first)

    def params(self) -> dict[str, Any]:
        """All weights."""
        width = {"embed": self.d_model}
        vocab = {"vocab": self.vocab_size}
        tied = self.readout == "tied"
        # A tied embedding is also contracted over its width, which decides its size.
        embedding = Param(vocab | width, role="embedding", fan_in=("embed",) if tied else ())
        declared = {"embedding": embedding, **self.body_params()}
        declared["final_norm"] = self.norm.params(self.d_model)
        if not tied:
            declared["readout"] = Param(
                width | vocab, role="readout", fan_in=("embed",), tag="readout"
            )
        return declared

    def resolved(self, family: Family = "adam") -> Any:
        """For each weight what its parameterisation gives it, for a family of optimizers."""
        return self.scaling.resolve(self.params(), len(self.layers), family)

    def scaled(self, weights: Weights) -> Any:
        """The weights as the forward pass sees them; every function below takes these."""
        return self.scaling.scale(self.params(), weights, len(self.layers))

    def hidden(
        self,
        weights: Weights,
        tokens: Tokens,
        position: Int[Array, "batch token"] | None = None,
        segment: Int[Array, "batch token"] | None = None,
        compute: Compute | None = None,
    ) -> Residual:
        """The residual stream after the last layer and norm; see `forward`."""
        return self.forward(weights, tokens, position, segment, compute).hidden

    def logits(
        self, weights: Weights, hidden: Residual, compute: Compute | None = None
    ) -> Float[Array, "batch token vocab"]:
        """Float32 scores of the next token."""
        compute = settled(compute, self.vocab_size)
        if self.readout == "tied":
            hidden = hidden * self.scaling.tied_factor(self.params()["embedding"])
            table = weights["embedding"].T
        else:
            table = weights["readout"]
        operand = compute.operands or hidden.dtype
        out = project(hidden, table.astype(operand), out=jnp.dtype("float32"))
        if self.logit_softcap is not None:
            out = self.logit_softcap * jnp.tanh(out / self.logit_softcap)
        return tap("logits", constrain(out, "batch", None, "vocab"))

    def embed(self, weights: Weights, tokens: Tokens, compute: Compute) -> Residual:
        x = jnp.take(weights["embedding"], tokens, axis=0).astype(compute.type)
        if self.embedding_scale is not None:
            # Of the base: initialisation and multiplier see to other widths. Rounded as in Gemma.
            width = (self.scaling.base or {}).get("embed", self.d_model)
            x = x * jnp.asarray(width**0.5, x.dtype)
        return tap("embedding", constrain(x, "batch", None, None))

    def result(
        self, weights: Weights, x: Residual, auxiliary: Auxiliary, length: int
    ) -> ForwardResult:
        """The result of a pass over rows of `length` tokens. x: after the last layer."""
        counts = {name: length * value for name, value in auxiliary.items() if name != PENALTY}
        return ForwardResult(self.normed(weights, x), auxiliary.get(PENALTY), counts)

    def normed(self, weights: Weights, x: Residual) -> Residual:
        """After the last layer."""
        return self.norm.apply(weights["final_norm"], x)

    def last_logits(
        self, weights: Weights, x: Residual, last: Int[Array, " batch"], compute: Compute
    ) -> Float[Array, "batch vocab"]:
        """Scores of what follows place `last` of each row."""
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return self.logits(weights, self.normed(weights, x), compute)[:, 0]
