"""A decoder-only transformer over a layer plan: pre-norm, residual, causal.

The model is its configuration; weights are a tree that it declares and is given back. The same
layers run in training (equal repeats scanned, or unrolled), prefill and single steps: what
differs is only what a layer's `remember` answers, i.e. which bags of entries its queries read.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mukv.attention import AnyAttention, Entries, Grouped
from mukv.cache import Cache, Slot
from mukv.cache.base import append, body_entries, fold, tail_entries
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.mesh import constrain
from mukv.core.norm import RMSNorm
from mukv.core.params import Param, map_params
from mukv.core.tap import capturing, tap
from mukv.core.typing import Array, Float, Int, Residual, Tokens, Weights
from mukv.model.block import AnyResidual, Gated, PreNorm
from mukv.model.passes import Pass, Remember, layer_params, unstacked
from mukv.model.plan import Resolved, Stage, resolve, scannable
from mukv.scaling.parameterization import Scaling
from mukv.scaling.stability import Family


@dataclass(frozen=True)
class Decoder:
    """vocab_size: at least the tokenizer's. plan: stages of layers; what a layer leaves open is
    `attention` and `mlp`. residual: where the norms stand. embedding_scale: "root_width" multiplies
    embeddings by the root of their width. readout: weights of its own, or the embedding's.
    logit_softcap: bound of the logits, by tanh. context: the longest sequence that the model is
    meant for; None if nothing limits it.
    """

    kind: Literal["decoder"] = "decoder"
    vocab_size: int = 264
    d_model: int = 128
    attention: AnyAttention = field(default_factory=Grouped)
    mlp: Gated = field(default_factory=Gated)
    plan: tuple[Stage, ...] = (Stage(),)
    norm: RMSNorm = field(default_factory=RMSNorm)
    residual: AnyResidual = field(default_factory=PreNorm)
    embedding_scale: Literal["root_width"] | None = None
    readout: Literal["linear", "tied"] = "linear"
    logit_softcap: float | None = None
    context: int | None = None
    scaling: Scaling = field(default_factory=Scaling)

    def __post_init__(self) -> None:
        for name in ("vocab_size", "d_model", "context"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise BadInput(name, getattr(self, name), "at least 1")
        if self.logit_softcap is not None and self.logit_softcap <= 0:
            raise BadInput("logit_softcap", self.logit_softcap, "greater than 0, or null")
        if not self.plan:
            raise BadInput("plan", [], "at least one stage")
        self.scaling.check(self.params())
        self.residual.check(self.norm, self.scaling)

    @cached_property
    def layers(self) -> tuple[Resolved, ...]:
        """Every layer, in order."""
        layers = resolve(self.plan, self.attention, self.mlp)
        return tuple(replace(layer, attention=self._scaled(layer.attention)) for layer in layers)

    def _scaled(self, attention: AnyAttention) -> AnyAttention:
        """With its logits as the parameterisation wants them at this width."""
        factor = self.scaling.logit_factor(attention.read_params(self.d_model)["query"])
        if factor == 1:
            return attention
        return replace(attention, scale=factor * (attention.scale or attention.query_dim**-0.5))

    @cached_property
    def writers(self) -> tuple[Resolved, ...]:
        """The layers that have a cache."""
        return tuple(layer for layer in self.layers if layer.writes)

    # Weights

    def params(self) -> dict[str, Any]:
        """All weights; those of a stage's slot are stacked over its repeats, slots are named by
        their place ("stage0.slot1")."""
        width = {"embed": self.d_model}
        vocab = {"vocab": self.vocab_size}
        tied = self.readout == "tied"
        # A tied embedding is also contracted over its width, which decides its size.
        embedding = Param(vocab | width, role="embedding", fan_in=("embed",) if tied else ())
        declared: dict[str, Any] = {"embedding": embedding}
        for s, stage in enumerate(self.plan):
            first = [layer for layer in self.layers if layer.stage == s and layer.repeat == 0]
            declared[f"stage{s}"] = {
                f"slot{layer.slot}": map_params(
                    lambda param, repeats=stage.repeats: param.stacked(repeats),
                    layer_params(layer, self.norm, self.d_model, self.residual),
                )
                for layer in first
            }
        declared["final_norm"] = self.norm.params(self.d_model)
        if not tied:
            declared["readout"] = Param(width | vocab, role="readout", fan_in=("embed",))
        return declared

    def resolved(self, family: Family = "adam") -> Any:
        """For each weight what its parameterisation gives it, for a family of optimizers."""
        return self.scaling.resolve(self.params(), len(self.layers), family)

    def scaled(self, weights: Weights) -> Any:
        """The weights as the forward pass sees them; every function below takes these."""
        return self.scaling.scale(self.params(), weights, len(self.layers))

    def unstack(self, weights: Weights) -> dict[str, Any]:
        """The same with one entry per layer: what decoding takes, so that no step slices."""
        return unstacked(self.layers, weights)

    # Forward pass

    def hidden(
        self,
        weights: Weights,
        tokens: Tokens,
        position: Int[Array, "batch token"] | None = None,
        segment: Int[Array, "batch token"] | None = None,
        compute: Compute | None = None,
    ) -> Residual:
        """The residual stream after the last layer and norm.

        position: place in the document, counted from 0 (default: place in the row). segment:
        number of the document; tokens see only their own (default: one per row).
        """
        compute = (compute or Compute()).resolve(self.vocab_size)
        if position is None:
            position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

        def remember(layer: Resolved, written: dict[str, Array]) -> tuple[Entries, ...]:
            group_segment = None if segment is None else segment[:, None]
            return (Entries(written, position[:, None], segment=group_segment),)

        x = self._embed(weights, tokens, compute)
        run = self._pass(compute, position, remember, aligned=True, segment=segment)
        known: dict[int, tuple[Entries, ...]] = {}
        for s, stage in enumerate(self.plan):
            stacked = weights[f"stage{s}"]
            here = [layer for layer in self.layers if layer.stage == s]
            if compute.unroll or capturing() or stage.repeats == 1 or not scannable(s, self.layers):
                for layer in here:
                    own = jax.tree.map(lambda leaf, r=layer.repeat: leaf[r], stacked)
                    x = run.layer(layer, own[f"slot{layer.slot}"], x, known)
            else:
                first = here[: len(stage.pattern)]

                def repeat(x: Residual, own: Any, first: Any = first) -> tuple[Residual, None]:
                    inner = dict(known)
                    for layer in first:
                        x = run.layer(layer, own[f"slot{layer.slot}"], x, inner)
                    return x, None

                x, _ = jax.lax.scan(repeat, x, stacked)
        return self.norm.apply(weights["final_norm"], x)

    def logits(
        self, weights: Weights, hidden: Residual, compute: Compute | None = None
    ) -> Float[Array, "batch token vocab"]:
        """Float32 scores of the next token."""
        compute = (compute or Compute()).resolve(self.vocab_size)
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

    def _embed(self, weights: Weights, tokens: Tokens, compute: Compute) -> Residual:
        x = jnp.take(weights["embedding"], tokens, axis=0).astype(compute.type)
        if self.embedding_scale is not None:
            # Of the base: initialisation and multiplier see to other widths. Rounded as in Gemma.
            width = (self.scaling.base or {}).get("embed", self.d_model)
            x = x * jnp.asarray(width**0.5, x.dtype)
        return tap("embedding", constrain(x, "batch", None, None))

    def _pass(
        self,
        compute: Compute,
        position: Int[Array, "batch token"],
        remember: Remember,
        aligned: bool,
        segment: Int[Array, "batch token"] | None = None,
    ) -> Pass:
        shared = (self.layers, self.norm, self.d_model, compute, position, segment)
        return Pass(*shared, remember, aligned, self.residual)

    # Decoding

    def empty_cache(
        self, batch: int, length: int, tail: int = 64, dtype: jnp.dtype | None = None
    ) -> Cache:
        """Room for `length` tokens a row in the bodies and `tail` behind them."""
        dtype = dtype or Compute().resolve(self.vocab_size).type

        def zeros(layer: Resolved, slots: int) -> dict[str, Array]:
            shapes = layer.attention.written(self.d_model, batch, slots, dtype)
            return {name: jnp.zeros(shape.shape, shape.dtype) for name, shape in shapes.items()}

        return Cache(
            slots=tuple(
                Slot(zeros(layer, min(length, layer.window or length)), zeros(layer, tail))
                for layer in self.writers
            ),
            length=jnp.zeros(batch, jnp.int32),
            filled=jnp.zeros((), jnp.int32),
        )

    def prefill(
        self,
        weights: Weights,
        cache: Cache,
        tokens: Tokens,
        count: Int[Array, " batch"],
        fresh: bool = True,
        compute: Compute | None = None,
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Read `count` tokens of each row at once; logits of what follows, and the cache.

        weights: unstacked. tokens: padded behind. The tail must be empty. fresh: the cache is
        known to be empty, so that only the new tokens are read.
        """
        compute = (compute or Compute()).resolve(self.vocab_size)
        position = cache.length[:, None] + jnp.arange(tokens.shape[1])
        bodies: dict[int, dict[str, Array]] = {}

        def remember(layer: Resolved, written: dict[str, Array]) -> tuple[Entries, ...]:
            body = cache.slots[self.writers.index(layer)].body
            bodies[layer.index] = fold(body, written, cache.length, count)
            new = Entries(written, position[:, None])
            if fresh:
                return (new,)
            return body_entries(body, cache.length, layer.window is not None), new

        x = self._embed(weights, tokens, compute)
        x = self._pass(compute, position, remember, aligned=fresh).all(weights, x)
        last = jnp.take_along_axis(x, (count - 1)[:, None, None], axis=1)
        slots = tuple(
            Slot(bodies[layer.index], slot.tail)
            for layer, slot in zip(self.writers, cache.slots, strict=True)
        )
        logits = self.logits(weights, self.norm.apply(weights["final_norm"], last), compute)[:, 0]
        return logits, Cache(slots, cache.length + count, cache.filled)

    def step(
        self,
        weights: Weights,
        cache: Cache,
        token: Int[Array, " batch"],
        compute: Compute | None = None,
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Read one token per row: logits of what follows, and the cache, one token fuller.

        weights: unstacked. The bodies come back as they are: leave them out of a loop's carry.
        """
        compute = (compute or Compute()).resolve(self.vocab_size)
        position = cache.position()[:, None]
        tails: dict[int, dict[str, Array]] = {}

        def remember(layer: Resolved, written: dict[str, Array]) -> tuple[Entries, ...]:
            slot = cache.slots[self.writers.index(layer)]
            tails[layer.index] = append(slot.tail, written, cache.filled)
            return (
                body_entries(slot.body, cache.length, layer.window is not None),
                tail_entries(tails[layer.index], cache.length, cache.filled + 1),
            )

        x = self._embed(weights, token[:, None], compute)
        x = self._pass(compute, position, remember, aligned=False).all(weights, x)
        slots = tuple(
            Slot(slot.body, tails[layer.index])
            for layer, slot in zip(self.writers, cache.slots, strict=True)
        )
        logits = self.logits(weights, self.norm.apply(weights["final_norm"], x), compute)[:, 0]
        return logits, Cache(slots, cache.length, cache.filled + 1)

    def fold(self, cache: Cache) -> Cache:
        """Move the tails into the bodies."""
        added = jnp.broadcast_to(cache.filled, cache.length.shape)
        slots = tuple(
            Slot(fold(slot.body, slot.tail, cache.length, added), slot.tail) for slot in cache.slots
        )
        return Cache(slots, cache.length + added, jnp.zeros_like(cache.filled))
