"""Decoder-only transformer over a layer plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import jax.numpy as jnp

from mukv.cache import FULL, Cache, Calibrated, Policy
from mukv.core.compute import Compute, settled
from mukv.core.errors import BadInput
from mukv.core.linear import look_up
from mukv.core.params import Param
from mukv.core.programs import Subprogram
from mukv.core.typing import Array, Float, Int, Residual, Tokens, Weights
from mukv.model.base import ForwardResult, LanguageModel
from mukv.model.cache_update import compressed
from mukv.model.empty_cache import empty_cache
from mukv.model.evicting import AnyThrough
from mukv.model.layer_inputs import Inputs, LayerInputs
from mukv.model.plan import ResolvedLayer, Stage
from mukv.model.policy_check import check_policy
from mukv.model.remember import positions
from mukv.model.stack import Stack


@dataclass(frozen=True)
class Decoder(LanguageModel):
    """Decoder-only transformer.

    plan: stages of layers; `attention` and `mlp` are used by layers that name none
    positions: "learned" adds a trained vector per position, up to `context`, to the embeddings
        (GPT-2); None for none
    layer_inputs: input of each layer that depends on the token itself (Gemma 4); None for none
    """

    kind: Literal["decoder"] = "decoder"
    plan: tuple[Stage, ...] = (Stage(),)
    positions: Literal["learned"] | None = None
    layer_inputs: LayerInputs | None = None

    def __post_init__(self) -> None:
        if self.positions and self.context is None:
            allowed = "a number of tokens, since positions are learned"
            raise BadInput("context", None, allowed)
        if not self.plan:
            raise BadInput("plan", [], "at least one stage")
        super().__post_init__()
        if self.layer_inputs is not None:
            self.layer_inputs.check(self.norm, self.scaling)

    @cached_property
    def stack(self) -> Stack:
        """The only stack, which has all layers."""
        return replace(self.stack_of(self.plan), inputs=self.layer_inputs)

    @cached_property
    def stacks(self) -> tuple[Stack, ...]:
        return (self.stack,)

    @property
    def writers(self) -> tuple[ResolvedLayer, ...]:
        """The layers that write entries and therefore have a cache."""
        return self.stack.writers

    def body_params(self) -> dict[str, Any]:
        declared: dict[str, Any] = {}
        if self.positions:
            dims = {"position": self.context or 0, "embed": self.d_model}
            declared["positions"] = Param(dims, role="embedding")
        if self.layer_inputs is not None:
            sizes = self.vocab_size, self.d_model, len(self.stack.layers)
            declared["layer_inputs"] = self.layer_inputs.params(*sizes, self.norm)
        return declared | self.stack.params()

    def placed(
        self,
        weights: Weights,
        tokens: Tokens,
        position: Int[Array, "batch token"],
        compute: Compute,
    ) -> tuple[Residual, Inputs | None]:
        """Return the embeddings of tokens at these positions, in the compute type, and the inputs
        of all layers, if they have one.

        Positions of padding may lie beyond the context and have the vector of the last one.
        """
        x = self.embed(weights, tokens, compute)
        if self.positions:
            last = (self.context or 1) - 1
            x = x + look_up(weights["positions"], jnp.clip(position, 0, last)).astype(x.dtype)
        if self.layer_inputs is None:
            return x, None
        return x, self.layer_inputs.make(weights["layer_inputs"], tokens, x, self.norm, compute)

    def unstack(self, weights: Weights) -> dict[str, Any]:
        outer = {name: value for name, value in weights.items() if not name.startswith("stage")}
        return {**outer, "layers": self.stack.unstack(weights)}

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
        if position is None:
            position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x, given = self.placed(weights, tokens, position, compute)
        rest = position, segment, compute, through, given
        x, auxiliary = self.stack.forward(weights, x, *rest)
        return self.result(weights, x, auxiliary, tokens.shape[1])

    @property
    def policy_stack(self) -> Stack:
        return self.stack

    def check_through(self, through: AnyThrough, tokens: int) -> None:
        through.check(self.stack, tokens)

    def empty_cache(
        self,
        batch: int,
        length: int,
        tail: int = 64,
        dtype: jnp.dtype | None = None,
        policy: Policy = FULL,
        centres: Calibrated | None = None,
        after: int | None = None,
    ) -> Cache:
        dtype = dtype or settled(None).type
        check_policy(self.stack, policy)
        return empty_cache(self.stack, batch, length, tail, dtype, policy, centres, after)

    def prefill(
        self,
        weights: Weights,
        cache: Cache,
        tokens: Tokens,
        count: Int[Array, " batch"],
        fresh: bool = True,
        compute: Compute | None = None,
        owned: bool = False,
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Read tokens in one pass; see `LanguageModel.prefill`.

        owned: whether the arrays of the cache may be overwritten

        Without layer inputs it can be compiled as `Subprograms`.
        """
        compute = settled(compute)
        outer = {name: value for name, value in weights.items() if name != "layers"}
        x, given = _enter(self, compute, outer, cache.length, tokens)
        rest = count, fresh, compute, given, owned
        x, cache = self.stack.prefill(weights["layers"], cache, x, *rest)
        return _leave(self, compute, outer, x, count), cache

    def step(
        self,
        weights: Weights,
        cache: Cache,
        token: Int[Array, " batch"],
        compute: Compute | None = None,
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        compute = settled(compute)
        x, given = self.placed(weights, token[:, None], cache.position()[:, None], compute)
        x, cache = self.stack.step(weights["layers"], cache, x, compute, given=given)
        return self.read_out(weights, x, compute)[:, 0], cache

    def fold(self, weights: Weights, cache: Cache) -> Cache:
        return self.stack.fold(weights["layers"], cache)

    def compressed(self, weights: Weights, recorded: Cache, empty: Cache) -> Cache:
        return compressed(self.stack.bags, weights["layers"], recorded, empty)

    def read_block(
        self,
        weights: Weights,
        cache: Cache,
        tokens: Tokens,
        compute: Compute | None = None,
        joins: bool = True,
    ) -> tuple[Float[Array, "batch token vocab"], Cache]:
        """Read known tokens in one pass; see `LanguageModel.read_block`."""
        compute = settled(compute)
        position = cache.length[:, None] + jnp.arange(tokens.shape[1])[None]
        x, given = self.placed(weights, tokens, position, compute)
        x, cache = self.stack.read_block(weights["layers"], cache, x, compute, joins, given)
        return self.read_out(weights, x, compute), cache


@partial(Subprogram, static=2)
def _enter(
    model: Decoder, compute: Compute, weights: Weights, length: Int[Array, " batch"], tokens: Tokens
) -> tuple[Residual, Inputs | None]:
    """Return what `Decoder.placed` does for tokens behind rows of these lengths."""
    return model.placed(weights, tokens, positions(tokens.shape[1], length), compute)


@partial(Subprogram, static=2)
def _leave(
    model: Decoder, compute: Compute, weights: Weights, x: Residual, count: Int[Array, " batch"]
) -> Float[Array, "batch vocab"]:
    """Return the logits of the last of `count` tokens."""
    return model.read_out(weights, x, compute, count - 1)[:, 0]
