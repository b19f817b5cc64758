"""Mixture of experts (Shazeer et al. 2017).

A router selects `top_k` of many small gated MLPs for each token and sums their outputs with
weights. Without a capacity no token is dropped: tokens are grouped by expert, and each group is
divided into blocks of the mean group size. There are at most two blocks per expert on average, so
that shapes are static and at most twice the necessary operations are computed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project, project_each, with_bias
from mukv.core.params import WIDEST, Param
from mukv.core.partition import by_data_shard
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights
from mukv.model.auxiliary import PENALTY, Auxiliary
from mukv.model.block import ACTIVATIONS, Activation, Feedforward, Gated

MOST_EXPERTS = 1 << 16
SMALLEST_SUM = 1e-20
"""Number that is added to the sum of a token's scores, which may all be zero (DeepSeek-V3)."""
EACH = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
"""Names of the weights that each expert has."""


class Routing(NamedTuple):
    """Result of the router for each token; float32.

    logits: output of the router
    share: scores, normalised to sum to one over the experts
    chosen: indices of the token's experts
    weight: factor of the output of each of these
    """

    logits: Float[Array, "batch token experts"]
    share: Float[Array, "batch token experts"]
    chosen: Int[Array, "batch token choice"]
    weight: Float[Array, "batch token choice"]


@dataclass(frozen=True)
class Experts(Feedforward):
    """A mixture of experts, of which the `top_k` with the largest scores process each token.

    experts: number of experts that a router chooses from
    top_k: number of experts that process a token
    hidden: inner width of an expert
    shared: number of further experts, which process every token
    shared_gate: whether the output of these is multiplied by sigmoid(x w), one number per token
        (Qwen3-Next)
    activation: function of the gate
    limit: upper bound of the input of the gate's function, and bound of the size of what it
        multiplies, in the experts that the router chooses (gpt-oss); None for none
    up_offset: number that is added to what the gate multiplies, in the same experts (gpt-oss: 1)
    biases: whether the router and the products of the experts that it chooses have biases
    router: function that turns the router's logits into scores
    normalise: whether the weights of a token's experts are divided by their sum
    scale: factor of the weights of a token's experts, after that division (DeepSeek-V3)
    groups: number of groups that the experts are in, of equal size and in order
    top_groups: number of groups from which a token's experts are chosen: those with the largest
        sums of their `group_best` best scores
    group_best: number of a group's best scores whose sum is compared: 2 in DeepSeek-V3 (2412.19437,
        section 2.1.2 and its code), 1 in DeepSeek-V2 (2405.04434, section 2.2.2)
    choice_bias: whether each expert has a number that is added to its score in the choice of groups
        and experts, and in nothing else (DeepSeek-V3, section 2.1.2). The language loss has no
        gradient for it. In training its gradient is the expert's share of a row's choices minus
        1 / experts, so that an optimizer lowers the numbers of experts that get more tokens than
        the mean. The speed is the learning rate of a bias, where the paper has a constant of its
        own; `balance` does not change it
    expert_scale: whether the weight of each expert is multiplied by a trained number of its own,
        which is 1 at first (Gemma 4)
    balance: weight of the load-balancing loss, per row, 1 for uniform routing (Switch Transformer,
        Fedus et al. 2022, equations 4 to 6)
    z_loss: weight of the squared logarithm of the router's normaliser (ST-MoE, Zoph et al. 2022,
        equation 5)
    capacity: bound of the tokens that one expert processes in training and evaluation, as a
        multiple of an equal share: of a row's tokens that choose it, the first
        capacity * top_k * tokens / experts, rounded up, are processed and the others are dropped;
        None to drop none
    """

    kind: Literal["experts"] = "experts"
    experts: int = 8
    top_k: int = 2
    hidden: int = 64
    shared: int = 0
    shared_gate: bool = False
    activation: Activation = "silu"
    limit: float | None = None
    up_offset: float = 0.0
    biases: bool = False
    router: Literal["softmax", "sigmoid"] = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    top_groups: int = 1
    group_best: int = 2
    choice_bias: bool = False
    expert_scale: bool = False
    balance: float = 0.01
    z_loss: float = 0.0
    capacity: float | None = None

    grows: ClassVar[tuple[str, ...]] = ("hidden",)

    def __post_init__(self) -> None:
        counts = ("experts", "top_k", "groups", "top_groups", "group_best")
        require_counts(self, *counts, most=MOST_EXPERTS)
        require_counts(self, "hidden", most=4 * WIDEST)
        if self.top_k > self.experts:
            raise BadInput("top_k", self.top_k, f"at most experts ({self.experts})")
        self._require_groups()
        if not 0 <= self.shared <= MOST_EXPERTS:
            raise BadInput("shared", self.shared, f"0 to {MOST_EXPERTS:,}")
        if self.shared_gate and not self.shared:
            raise BadInput("shared_gate", True, "false where there are no shared experts")
        if self.normalise and self.top_k == 1:
            allowed = "false with top_k 1: a single weight would always be one and not learn"
            raise BadInput("normalise", self.normalise, allowed)
        for name in ("balance", "z_loss"):
            if getattr(self, name) < 0:
                raise BadInput(name, getattr(self, name), "at least 0")
        for name in ("capacity", "limit"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise BadInput(name, getattr(self, name), "greater than 0, or null")
        if self.scale <= 0:
            raise BadInput("scale", self.scale, "greater than 0")

    def _require_groups(self) -> None:
        """Raise BadInput for groups that the experts can't be in, or that have too few of them."""
        if self.experts % self.groups:
            raise BadInput("groups", self.groups, f"a number that divides experts ({self.experts})")
        size = self.experts // self.groups
        if self.groups > 1 and size < self.group_best:
            most, least = self.experts // self.group_best, self.group_best
            allowed = f"at most {most}: a group has at least group_best ({least}) experts"
            raise BadInput("groups", self.groups, allowed)
        if self.top_groups > self.groups:
            raise BadInput("top_groups", self.top_groups, f"at most groups ({self.groups})")
        if self.top_k > self.top_groups * size:
            least = -(-self.top_k // size)
            allowed = f"at least {least}: top_k ({self.top_k}) experts in groups of {size}"
            raise BadInput("top_groups", self.top_groups, allowed)

    @property
    def always(self) -> Gated:
        """The shared experts, as one MLP."""
        return Gated(hidden=self.shared * self.hidden, activation=self.activation)

    def params(self, d_model: int) -> dict[str, Any]:
        up = Param(
            {"experts": self.experts, "embed": d_model, "expert_hidden": self.hidden},
            fan_in=("embed",),
            batch=("experts",),
            active=self.top_k / self.experts,
        )
        down = replace(
            up,
            dims={"experts": self.experts, "expert_hidden": self.hidden, "embed": d_model},
            fan_in=("expert_hidden",),
            ends_branch=True,
        )
        scores = {"embed": d_model, "experts": self.experts}
        declared: dict[str, Any] = {
            "router": Param(scores, role="router", fan_in=("embed",)),
            "gate": replace(up, tag="gate"),
            "up": up,
            "down": down,
        }
        if self.biases:
            bias = replace(up, role="vector", init="zeros", fan_in=())
            inner = {"experts": self.experts, "expert_hidden": self.hidden}
            outer = {"experts": self.experts, "embed": d_model}
            declared["router_bias"] = Param({"experts": self.experts}, role="vector", init="zeros")
            declared["gate_bias"] = declared["up_bias"] = replace(bias, dims=inner)
            declared["down_bias"] = replace(bias, dims=outer, ends_branch=True)
        if self.choice_bias:
            declared["choice_bias"] = Param({"experts": self.experts}, role="vector", init="zeros")
        if self.expert_scale:
            declared["expert_scale"] = Param({"experts": self.experts}, role="vector", init="ones")
        if self.shared:
            declared["shared"] = self.always.params(d_model, "shared_hidden")
        if self.shared_gate:
            gate = {"embed": d_model, "shared_gate": 1}
            declared["shared_gate"] = Param(gate, role="router", fan_in=("embed",))
        return declared

    def apply(
        self, weights: Weights, x: Residual, counted: Bool[Array, "batch token"] | None = None
    ) -> tuple[Residual, Auxiliary | None]:
        return self.mix(weights, x, x, counted)

    def mix(
        self,
        weights: Weights,
        x: Residual,
        asked: Residual,
        counted: Bool[Array, "batch token"] | None = None,
    ) -> tuple[Residual, Auxiliary | None]:
        """Compute what `apply` does. asked: what the router reads in place of x"""
        routing = self.route(weights, asked)
        experts = {name: weights[name] for name in EACH if name in weights}
        own = (x, routing.chosen, routing.weight)
        dropped = None
        if counted is None or self.capacity is None:
            y = by_data_shard(self._without_capacity, experts, *own, tokens="apart")
        else:
            y, dropped = by_data_shard(self._within_capacity, experts, *own, counted)
        if self.shared:
            always = self.always.apply(weights["shared"], x)[0]
            if self.shared_gate:
                share = jax.nn.sigmoid(project(x.astype(jnp.float32), weights["shared_gate"]))
                always = (always * share).astype(always.dtype)
            y = y + always
        if counted is None:
            return y, None
        return y, self._auxiliary(routing, counted, dropped, weights)

    def route(self, weights: Weights, x: Residual) -> Routing:
        """Select the experts of each token, in float32 (Switch Transformer, section 2.4)."""
        logits = project(x.astype(jnp.float32), weights["router"])
        logits = with_bias(logits, weights, "router_bias")
        if self.router == "softmax":
            score = share = jax.nn.softmax(logits)
        else:
            score = jax.nn.sigmoid(logits)
            share = score / (jnp.sum(score, axis=-1, keepdims=True) + SMALLEST_SUM)
        weight, chosen = self._choose(score, weights)
        if self.normalise:
            weight = weight / (jnp.sum(weight, axis=-1, keepdims=True) + SMALLEST_SUM)
        weight = weight if self.scale == 1 else weight * self.scale
        if self.expert_scale:
            weight = weight * jnp.take(weights["expert_scale"].astype(jnp.float32), chosen, axis=0)
        return Routing(logits, share, chosen, weight)

    def _choose(
        self, score: Float[Array, "batch token experts"], weights: Weights
    ) -> tuple[Float[Array, "batch token choice"], Int[Array, "batch token choice"]]:
        """Return the scores of each token's experts, and their indices."""
        if not self.choice_bias and self.top_groups == self.groups:
            weight, chosen = jax.lax.top_k(score, self.top_k)
            return weight, chosen
        wanted = jax.lax.stop_gradient(with_bias(score, weights, "choice_bias"))
        if self.top_groups < self.groups:
            grouped = wanted.reshape(*wanted.shape[:-1], self.groups, -1)
            best = jnp.sum(jax.lax.top_k(grouped, self.group_best)[0], axis=-1)
            eligible = jax.nn.one_hot(jax.lax.top_k(best, self.top_groups)[1], self.groups)
            eligible = jnp.any(eligible > 0, axis=-2)[..., None]
            wanted = jnp.where(eligible, grouped, -jnp.inf).reshape(wanted.shape)
        _, chosen = jax.lax.top_k(wanted, self.top_k)
        return jnp.take_along_axis(score, chosen, axis=-1), chosen

    def _without_capacity(
        self,
        weights: Weights,
        x: Residual,
        chosen: Int[Array, "batch token choice"],
        weight: Float[Array, "batch token choice"],
    ) -> Residual:
        """Process every token by all of its experts."""
        expert = chosen.reshape(-1)
        choices = expert.shape[0]
        block = -(-choices // self.experts)
        blocks = min(choices, 2 * self.experts)
        number, size = _ranked(jax.nn.one_hot(expert, self.experts, dtype=jnp.int32))
        blocks_of_expert = -(-size // block)
        last = jnp.cumsum(blocks_of_expert)
        block_expert = jnp.sum(jnp.arange(blocks)[:, None] >= last[None], axis=1)
        block_expert = jnp.minimum(block_expert, self.experts - 1)
        slot = (last - blocks_of_expert)[expert] * block + number
        flat = x.reshape(-1, x.shape[-1])
        token = jnp.full(blocks * block, len(flat)).at[slot].set(jnp.arange(choices) // self.top_k)
        inputs = flat.at[token].get(mode="fill", fill_value=0).reshape(blocks, block, -1)
        out = self._mlp({name: leaf[block_expert] for name, leaf in weights.items()}, inputs)
        out = out.reshape(blocks * block, -1)[slot].reshape(*chosen.shape, -1)
        return _weighted_sum(out, weight)

    def _within_capacity(
        self,
        weights: Weights,
        x: Residual,
        chosen: Int[Array, "batch token choice"],
        weight: Float[Array, "batch token choice"],
        counted: Bool[Array, "batch token"],
    ) -> tuple[Residual, Float[Array, " batch"]]:
        """Process each row's tokens up to the capacity of the experts.

        Returns the output, and the fraction of each row's choices that are dropped.
        """
        batch, length, width = x.shape
        room = min(length, math.ceil((self.capacity or 1) * self.top_k * length / self.experts))
        taken = jax.nn.one_hot(chosen, self.experts, dtype=jnp.int32) * counted[..., None, None]
        number, _ = jax.vmap(_ranked)(taken.reshape(batch, -1, self.experts))
        number = number.reshape(chosen.shape)
        fits = counted[..., None] & (number < room)
        # The index beyond the last place is dropped by the scatter.
        slot = jnp.where(fits, chosen * room + number, self.experts * room).reshape(batch, -1)
        rows = jnp.arange(batch)[:, None]
        token = jnp.full((batch, self.experts * room), length)
        place = jnp.broadcast_to(jnp.arange(slot.shape[1]) // self.top_k, slot.shape)
        token = token.at[rows, slot].set(place, mode="drop")
        inputs = x.at[rows, token].get(mode="fill", fill_value=0)
        inputs = inputs.reshape(batch, self.experts, room, width).swapaxes(0, 1)
        out = self._mlp(weights, inputs.reshape(self.experts, batch * room, width))
        out = out.reshape(self.experts, batch, room, width).swapaxes(0, 1)
        out = out.reshape(batch, self.experts * room, width)
        out = out.at[rows, slot].get(mode="fill", fill_value=0).reshape(*chosen.shape, width)
        all_choices = jnp.maximum(jnp.sum(counted, axis=1) * self.top_k, 1)
        return _weighted_sum(out, weight), 1 - jnp.sum(fits, axis=(1, 2)) / all_choices

    def _mlp(
        self, weights: Weights, x: Float[Array, "block row embed"]
    ) -> Float[Array, "block row embed"]:
        """Apply the gated MLP to each block of tokens, with one set of weights per block."""

        def product(x: Float[Array, "block row _"], name: str) -> Float[Array, "block row _"]:
            made = project_each(x, weights[name])
            if not self.biases:
                return made
            return made + weights[f"{name}_bias"].astype(made.dtype)[:, None]

        gate, up = product(x, "gate"), product(x, "up")
        if self.limit is not None:
            gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        if self.up_offset:
            up = up + self.up_offset
        return product(ACTIVATIONS[self.activation](gate) * up, "down")

    def _auxiliary(
        self,
        routing: Routing,
        counted: Bool[Array, "batch token"],
        dropped: Float[Array, " batch"] | None,
        weights: Weights,
    ) -> Auxiliary:
        """Compute penalty, balance and dropped fraction of each row, without padding.

        weights: weights of this layer; the choice bias adds nothing to the penalty but a gradient
        """
        number = jnp.maximum(jnp.sum(counted, axis=1), 1)

        def mean(values: Float[Array, "batch token *rest"]) -> Float[Array, "batch *rest"]:
            return jnp.einsum("bt...,bt->b...", values, counted / number[:, None])

        load = mean(jnp.sum(jax.nn.one_hot(routing.chosen, self.experts), axis=2)) / self.top_k
        balance = self.experts * jnp.sum(load * mean(routing.share), axis=-1)
        penalty = self.balance * balance
        if self.z_loss:
            penalty += self.z_loss * mean(jax.nn.logsumexp(routing.logits, axis=-1) ** 2)
        if self.choice_bias:
            bias = jnp.asarray(weights["choice_bias"], jnp.float32)
            pull = jnp.sum((load - 1 / self.experts) * bias[None], axis=-1)
            penalty += pull - jax.lax.stop_gradient(pull)
        reported = {} if dropped is None else {"expert_dropped": dropped}
        return {PENALTY: penalty, "expert_balance": balance, **reported}


def _ranked(
    taken: Int[Array, "choice experts"],
) -> tuple[Int[Array, " choice"], Int[Array, " experts"]]:
    """Count, for each choice, the earlier choices of the same expert; and the choices per expert.

    taken: one-hot expert of each choice, zero for choices that don't count
    """
    up_to = jnp.cumsum(taken, axis=0)
    return jnp.sum((up_to - taken) * taken, axis=1), up_to[-1]


def _weighted_sum(
    out: Float[Array, "batch token choice embed"], weight: Float[Array, "batch token choice"]
) -> Residual:
    """Sum the outputs of each token's experts with their weights."""
    return jnp.sum(out * weight[..., None], axis=2).astype(out.dtype)
