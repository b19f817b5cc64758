"""Every combination of attention, position and layer plan that exists, at tiny size.

The laws walk it. A new part joins by a line in its own table here; a table that lacks a part
fails in test_matrix.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from mukv.attention import AnyAttention, Grouped
from mukv.core import params
from mukv.core.compute import Compute
from mukv.model import Decoder, Layer, Stage
from mukv.model.block import Gated
from mukv.model.loss import summed_loss
from mukv.position import AnyPosition, Llama3, NoPE, RoPE

D_MODEL, VOCAB, LENGTH = 16, 31, 12
EXACT = Compute(dtype="float32", operands="float32", unroll=True)

ATTENTIONS: dict[str, AnyAttention] = {
    "mha": Grouped(heads=4, kv_heads=4, head_dim=8),
    "gqa": Grouped(heads=4, kv_heads=2, head_dim=8),
    "mqa": Grouped(heads=4, kv_heads=1, head_dim=8),
}
POSITIONS: dict[str, AnyPosition] = {
    "nope": NoPE(),
    "rope": RoPE(),
    "rope-llama3": RoPE(base=100.0, scaling=Llama3(factor=4.0, original_length=8)),
}
PLANS: dict[str, tuple[Stage, ...]] = {
    "plain": (Stage(repeats=2),),
    "window": (Stage((Layer(window=3),), repeats=2),),
    "local-global": (Stage((Layer(window=3), Layer()), repeats=2),),
    "reuse": (Stage((Layer(), Layer(reads=-1)), repeats=2),),
    "reuse-window": (Stage((Layer(window=4), Layer(window=4, reads=-1)), repeats=2),),
    "last-layers": (Stage(repeats=2), Stage((Layer(reads=1),), repeats=2)),
    "hybrid": (Stage((Layer(window=5), Layer(position=NoPE())), repeats=1), Stage()),
}
COMBINATIONS = list(itertools.product(ATTENTIONS, POSITIONS, PLANS))


def build(attention: str, position: str, plan: str, **changes: object) -> Decoder:
    """The model of one combination."""
    chosen = dataclasses.replace(ATTENTIONS[attention], position=POSITIONS[position])
    model = Decoder(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        attention=chosen,
        mlp=Gated(hidden=24),
        plan=PLANS[plan],
    )
    return dataclasses.replace(model, **changes)  # pyright: ignore[reportArgumentType]


def weights(model: Decoder, seed: int = 0) -> dict:
    """Random weights, gains included, so that nothing is hidden by a one or a zero."""
    random = np.random.default_rng(seed)

    def draw(param: params.Param) -> np.ndarray:
        size = param.fan_in_size**-0.5
        drawn = size * random.standard_normal(param.shape) + (param.init == "ones")
        return drawn.astype(np.float32)

    return params.map_params(draw, model.params())


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(100 + seed).integers(0, VOCAB, (rows, length))
    return drawn.astype(np.int32)


def logits(model: Decoder, compute: Compute = EXACT) -> Callable[..., jax.Array]:
    """The forward pass of training, compiled: (weights, tokens, position, segment) -> logits."""

    @jax.jit
    def forward(tree: dict, ids: jax.Array, position: jax.Array, segment: jax.Array) -> jax.Array:
        hidden = model.hidden(tree, ids, position, segment, compute)
        return model.logits(tree, hidden, compute)

    return forward


def loss_and_gradient(model: Decoder, compute: Compute) -> Callable[..., tuple[jax.Array, dict]]:
    """(weights, tokens) -> summed loss and its gradient, compiled."""

    def loss(tree: dict, ids: jax.Array) -> jax.Array:
        ones = jnp.ones(ids.shape)
        return summed_loss(model, tree, ids, jnp.roll(ids, -1, axis=1), ones, compute=compute)

    return jax.jit(jax.value_and_grad(loss))
