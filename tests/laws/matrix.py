"""Every combination of attention, position and layer plan that exists, at tiny size.

The laws walk it. A new part joins by a line in its own table here; a table that lacks a part
fails in test_matrix.py.
"""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp

from mukv.attention import AnyAttention, Grouped
from mukv.core import params
from mukv.core.compute import Compute
from mukv.model import Decoder, Layer, Stage
from mukv.model.block import Gated
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
    import dataclasses

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
    declared = model.params()
    drawn = params.initialise(
        declared,
        params.map_params(lambda p: model.scaling.resolve(p).deviation, declared),
        jax.random.key(seed),
    )
    shake = params.initialise(
        params.map_params(lambda p: params.Param(p.dims), declared),
        params.map_params(lambda p: 0.1, declared),
        jax.random.key(seed + 1),
    )
    return jax.tree.map(jnp.add, drawn, shake)


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> jax.Array:
    return jax.random.randint(jax.random.key(100 + seed), (rows, length), 0, VOCAB)


def logits(model: Decoder, tree: dict, ids: jax.Array, compute: Compute = EXACT, **more) -> jax.Array:
    """The forward pass of training, compiled."""

    def forward(tree: dict, ids: jax.Array) -> jax.Array:
        return model.logits(tree, model.hidden(tree, ids, compute=compute, **more), compute)

    return jax.jit(forward)(tree, ids)
