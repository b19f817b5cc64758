"""Bytes and floating-point operations of a model, computed from declarations without allocation."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray

from mukv.attention import AnyAttention
from mukv.cache import FULL, Policy
from mukv.core.compute import Compute
from mukv.core.params import abstract, named
from mukv.model.base import LanguageModel
from mukv.model.plan import ResolvedLayer
from mukv.model.stack import Stack


def cached(stack: Stack, layer: ResolvedLayer) -> dict[str, tuple[int, int]]:
    """Return the number of heads and the width of each tensor of an entry in this layer.

    Names have the store in front where the layer has several ("window.key"). Empty for a layer that
    reads another layer's entries.
    """
    bags = _entries(layer.attention, stack.d_model) if layer.writes else {}
    alone = len(bags) == 1
    return {
        tensor if alone else f"{name}.{tensor}": shape
        for name, entry in bags.items()
        for tensor, shape in entry.items()
    }


@cache
def _entries(attention: AnyAttention, d_model: int) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the number of heads and the width of each tensor of an entry, by store."""
    written = attention.written(d_model, 1, 1, jnp.dtype("float32"))
    return {
        name: {tensor: (leaf.shape[1], leaf.shape[3]) for tensor, leaf in written[name].items()}
        for name in attention.bags
    }


def entry_bytes(stack: Stack, layer: ResolvedLayer, dtype: jnp.dtype) -> dict[str, int]:
    """Return the bytes of one entry by store; empty for a layer that reads another's entries."""
    bags = _entries(layer.attention, stack.d_model) if layer.writes else {}
    return {
        name: dtype.itemsize * sum(heads * width for heads, width in entry.values())
        for name, entry in bags.items()
    }


def state_bytes(layer: ResolvedLayer) -> int:
    """Return the bytes per row of this layer's states, which are float32."""
    states = layer.attention.states.values() if layer.writes else ()
    return 4 * sum(math.prod(shape) for state in states for shape in state.shapes.values())


def cache_bytes(
    model: LanguageModel,
    batch: int,
    length: int,
    tail: int,
    dtype: jnp.dtype,
    policy: Policy = FULL,
    after: int | None = None,
) -> int:
    """Return the bytes of `empty_cache` with these sizes, without allocating it."""
    if not policy.everything:
        room = batch, length, tail
        return jax.eval_shape(lambda: model.empty_cache(*room, dtype, policy, after=after)).nbytes()
    total = batch * model.state_bytes(dtype)
    for capacity in model.capacities(length, tail):
        for layer in capacity.stack.writers:
            sizes = entry_bytes(capacity.stack, layer, dtype)
            for name, bag in layer.bags.items():
                kept = bag.room(capacity.length) + bag.places(capacity.tail)
                total += batch * kept * sizes[name]
            total += batch * state_bytes(layer)
        total += 4 * (batch + (batch if capacity.by_row else 1))
    return total


def product_flops(model: LanguageModel, declared: Any) -> float:
    """Return the operations per token of the forward pass's products with these weights.

    declared: tree of `Param`, of the model or of its adapters
    """
    return sum(
        2 * param.size * param.active / model.tokens_per_use(name.split(".")[0])
        for name, param in named(declared).items()
        if param.fan_in
    )


def flops_per_token(model: LanguageModel, length: int, adapters: Any = None) -> int:
    """Return the floating-point operations of training per token at this sequence length.

    Only products are counted; the backward pass counts twice the forward pass. Attention counts
    visible pairs only, and experts those that a token is routed to.

    adapters: tree of `Param` of the adapters, if only these are trained; the backward pass of all
        other weights then has one product instead of two
    """

    products = product_flops(model, model.params())
    if adapters is not None:
        products = 2 / 3 * products + product_flops(model, adapters)
    attention = sum(
        layer.attention.pair_flops(layer.bags, max(length // rate.entry, 1), layer.most)
        / rate.query
        + layer.attention.token_flops() / rate.entry
        for stack, rate in zip(model.stacks, model.rates, strict=True)
        for layer in stack.layers
    )
    return round(3 * (products + attention))


def saved_bytes(model: LanguageModel, length: int, compute: Compute) -> int:
    """Return the bytes in the device's memory that the forward pass over one row keeps for the
    backward pass, rounded weights included; the forward pass is traced, nothing is computed.

    length: tokens of the row. compute: settings, resolved
    """
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)

    def saved(weights: Any, tokens: Any, position: Any, segment: Any) -> list[Any]:
        def hidden(weights: Any) -> Any:
            return model.forward(weights, tokens, position, segment, compute).hidden

        return jax.tree.leaves(jax.vjp(hidden, weights)[1])

    traced = jax.make_jaxpr(saved)(abstract(model.params()), *(tokens,) * 3).jaxpr
    given = set(map(id, traced.invars))
    made = {id(var): var.aval for var in traced.outvars if id(var) not in given}
    arrays = (aval for aval in made.values() if isinstance(aval, ShapedArray))
    return sum(
        array.size * array.dtype.itemsize
        for array in arrays
        if array.memory_space != jax.memory.Space.Host
    )
