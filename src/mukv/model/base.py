"""The interface of language models: embedding, layers, readout, and decoding with a cache.

A model is its configuration. It declares the weights, and every method takes them as an argument.
Training, evaluation, decoding and analysis use a model through this interface only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from mukv.attention import AnyAttention, Grouped
from mukv.cache import FULL, Cache, Calibrated, Policy
from mukv.core.arguments import token_ids
from mukv.core.compute import Compute
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.core.params import WIDEST, initialise
from mukv.core.partition import constrain
from mukv.core.table import Component
from mukv.core.typing import Array, Float, Int, Residual, Tokens, Weights
from mukv.model.auxiliary import PENALTY, Auxiliary
from mukv.model.block import AnyResidual, Gated, PreNorm
from mukv.model.continued import Continued
from mukv.model.embeddings import Embeddings
from mukv.model.evicting import AnyThrough
from mukv.model.feedforward import AnyFeedforward
from mukv.model.plan import ResolvedLayer, Stage
from mukv.model.rates import Capacity, StackRate
from mukv.model.stack import Stack
from mukv.scaling.parameterization import Scaling
from mukv.scaling.stability import UpdateFamily


class ForwardResult(NamedTuple):
    """Result of a forward pass over whole rows.

    hidden: residual stream after the last layer and norm
    penalty: penalty that training adds to the cross-entropy, in nats per token of each row; None
        for none
    counts: numbers to log by name, summed over each row; a run logs them per token
    """

    hidden: Residual
    penalty: Float[Array, " batch"] | None = None
    counts: dict[str, Float[Array, " batch"]] = {}  # noqa: RUF012 (never changed)


@dataclass(frozen=True)
class LanguageModel(Continued, Embeddings, Component):
    """Base class of language models; the fields are the YAML keys.

    vocab_size: number of token ids; at least the tokenizer's
    d_model: width of the residual stream
    attention: attention of the layers that name none
    mlp: feed-forward part of the layers that name none
    norm: norm of every layer and after the last one
    residual: placement of the norms relative to the residual branches
    embedding_scale: "root_width" multiplies embeddings by the square root of their width; None for
        no factor
    readout: "linear" for trained output weights, "tied" to use the embedding's
    logit_softcap: bound of the logits, softcap * tanh(logit / softcap); None for none
    context: longest sequence that the model is meant for, in tokens; None for no limit
    scaling: parameterisation: how initialisation and learning rates change with the sizes

    Raises BadInput for values that don't fit each other.
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
    """Fields that scale with the width of the model."""
    cache_class: ClassVar[type[Any]] = Cache
    """Class of the cache, with the methods and fields that a decode loop uses of `Cache`."""

    def __post_init__(self) -> None:
        require_counts(self, "d_model", most=WIDEST)
        require_counts(self, "vocab_size", most=1 << 26)
        require_counts(self, "context")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise BadInput("logit_softcap", self.logit_softcap, "greater than 0, or null")
        self.scaling.check(self.params())
        self.residual.check(self.norm, self.scaling)

    # Methods of a subclass

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        """The stacks of layers, in the order of computation."""
        raise NotImplementedError

    def body_params(self) -> dict[str, Any]:
        """Declare the weights between embedding and readout."""
        raise NotImplementedError

    def unstack(self, weights: Weights) -> dict[str, Any]:
        """Return the weights with one entry per layer instead of arrays stacked over repeats.

        Decoding takes this form, so that no step slices stacked arrays.
        """
        raise NotImplementedError

    def forward(
        self,
        weights: Weights,
        tokens: Tokens,
        position: Int[Array, "batch token"] | None = None,
        segment: Int[Array, "batch token"] | None = None,
        compute: Compute | None = None,
        through: AnyThrough | None = None,
    ) -> ForwardResult:
        """Run whole rows of tokens through the model, without a cache.

        weights: scaled (see `scaled`) and stacked
        position: place of each token in its document, from 0; its place in the row if None
        segment: number of each token's document, from 1, and 0 for padding; tokens attend within
            their document only; one document per row if None
        compute: settings of the forward pass; the defaults if None
        through: a cache policy or gates that drop entries between tokens; None for none
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
        after: int | None = None,
    ) -> Any:
        """Allocate an empty cache.

        batch: number of rows
        length: capacity of the bodies, in tokens per row
        tail: number of decoding steps until `fold` must be called
        dtype: type of the entries; the compute type if None
        policy: cache policy of layers without a window
        centres: calibrated cluster centres by layer, for policies that use them
        after: most tokens of a row that follow its prompt, for which a policy that holds them has
            room beyond its budget; None if that is not known: it has room for `length` entries

        Raises BadInput for a policy that does not fit.
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
        """Read the first `count` tokens of each row in one pass.

        weights: scaled and unstacked
        cache: cache with an empty tail
        tokens: padded at the end of each row
        fresh: whether the cache is empty, so that only the new tokens need to be read

        Returns the float32 logits of the token after those, and the updated cache.
        """
        raise NotImplementedError

    def step(
        self,
        weights: Weights,
        cache: Any,
        token: Int[Array, " batch"],
        compute: Compute | None = None,
    ) -> tuple[Float[Array, "batch vocab"], Any]:
        """Read one token per row.

        weights: scaled and unstacked

        Returns the float32 logits of the next token, and the updated cache. The part that the
        cache's `split` calls frozen is returned unchanged.
        """
        raise NotImplementedError

    def fold(self, weights: Weights, cache: Any) -> Any:
        """Move the entries of the tails to the bodies.

        weights: scaled and unstacked; policies use them to score entries
        """
        raise NotImplementedError

    # Methods with a default

    def check_tokenizer(self, vocab_size: int) -> None:
        """Raise BadInput if a field names a token id that a tokenizer of this size lacks."""

    @property
    def rates(self) -> tuple[StackRate, ...]:
        """The rate of each stack."""
        return (StackRate(),) * len(self.stacks)

    def capacities(self, length: int, tail: int) -> tuple[Capacity, ...]:
        """Return the sizes of the cache of each stack that `empty_cache` allocates.

        length, tail: arguments of `empty_cache`
        """
        return tuple(Capacity(stack, length, tail) for stack in self.stacks)

    def state_bytes(self, dtype: jnp.dtype) -> int:
        """Return the bytes per row that decoding keeps in addition to the caches of the stacks."""
        return 0

    def tokens_per_use(self, part: str) -> int:
        """Return the minimum number of tokens per application of a group of weights, for FLOPs.

        part: name of the group in `params`
        """
        return 1

    # Shared methods

    @cached_property
    def layers(self) -> tuple[ResolvedLayer, ...]:
        """All layers, in order."""
        return tuple(layer for stack in self.stacks for layer in stack.layers)

    def stack_of(self, plan: tuple[Stage, ...], first: int = 0) -> Stack:
        """Return a stack of the layers of a plan at the model's own width. first: number of its
        first layer."""
        shared = (self.norm, self.residual, self.scaling)
        return Stack(self.d_model, self.attention, self.mlp, plan, *shared, first)

    def params(self) -> dict[str, Any]:
        """Declare all weights."""
        outer = self.outer_params()
        return {"embedding": outer.pop("embedding"), **self.body_params(), **outer}

    def resolved(self, family: UpdateFamily = "adam") -> Any:
        """Return deviation, multiplier and learning rate factors of each weight, from its scaling,
        for a family of optimizers.
        """
        return self.scaling.resolve(self.params(), len(self.layers), family)

    def scaled(self, weights: Weights) -> Any:
        """Multiply the weights by the forward multipliers of the parameterisation.

        All methods below except `__call__` take scaled weights.
        """
        return self.scaling.scale(self.params(), weights, len(self.layers))

    def draw(self, key: Array) -> dict[str, Any]:
        """Draw float32 weights with the standard deviations of the parameterisation.

        key: random key
        """
        deviations = jax.tree.map(lambda weight: weight.deviation, self.resolved())
        return initialise(self.params(), deviations, key)

    def init(self, seed: int = 0) -> dict[str, Any]:
        """Draw the weights that training with this seed starts from: float32, by nested names."""
        return self.draw(jax.random.key(seed))

    def __call__(self, weights: Weights, tokens: Any) -> Float[Array, "*batch token vocab"]:
        """Compute the float32 logits of the token after each of `tokens`.

        This is a pure function, to which jit, grad and vmap apply.

        weights: weights as `init` draws and training saves them, without the multipliers of the
            parameterisation, which are applied here
        tokens: ids, [batch token] or [token]

        Raises BadInput for other shapes and types, and for ids outside of the vocabulary unless
        `tokens` is traced.
        """
        if not isinstance(tokens, Tracer):
            ids = jnp.asarray(token_ids("tokens", tokens, self.vocab_size))
        elif tokens.ndim in (1, 2) and jnp.issubdtype(tokens.dtype, jnp.integer):
            ids = jnp.atleast_2d(tokens)
        else:
            allowed = "integers of shape [token] or [batch token]"
            raise BadInput("tokens", f"{tokens.dtype} of shape {tokens.shape}", allowed)
        scaled = self.scaled(weights)
        logits = self.logits(scaled, self.hidden(scaled, ids))
        return logits[0] if len(np.shape(tokens)) == 1 else logits

    def hidden(
        self,
        weights: Weights,
        tokens: Tokens,
        position: Int[Array, "batch token"] | None = None,
        segment: Int[Array, "batch token"] | None = None,
        compute: Compute | None = None,
    ) -> Residual:
        """Return the residual stream after the last layer and norm; arguments as in `forward`."""
        return self.forward(weights, tokens, position, segment, compute).hidden

    def result(
        self, weights: Weights, x: Residual, auxiliary: Auxiliary, length: int
    ) -> ForwardResult:
        """Make the result of a forward pass from `x`, the residual stream before the last norm, of
        rows of `length` tokens.
        """
        counts = {name: length * value for name, value in auxiliary.items() if name != PENALTY}
        hidden = constrain(self.normed(weights, x), "batch", "token", None)
        return ForwardResult(hidden, auxiliary.get(PENALTY), counts)
