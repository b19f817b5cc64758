"""Every combination of attention, position and layer plan that exists, at tiny size.

The laws walk it. A new part joins by a line in its own table here; a table that lacks a part
fails in test_matrix.py.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.attention import (
    HCA,
    AnyAttention,
    Grouped,
    GroupedTied,
    Latent,
    SharedKV,
    TensorProduct,
)
from mukv.core import params
from mukv.core.compute import Compute
from mukv.core.norm import RMSNorm
from mukv.model import Decoder, LanguageModel, Layer, Stage
from mukv.model.block import Gated, SandwichNorm
from mukv.model.concept import (
    Attend,
    Concatenate,
    Concept,
    Concepts,
    Cross,
    Delimiter,
    Fixed,
    Learned,
    Max,
    Prefix,
    Residually,
    SelectPool,
    Sum,
    Weighted,
)
from mukv.model.experts import Experts
from mukv.model.loss import summed_loss
from mukv.position import (
    FIRE,
    KERPLE,
    ALiBi,
    AnyPosition,
    CoPE,
    Llama3,
    LogLength,
    NoPE,
    RoPE,
    YaRN,
)

D_MODEL, VOCAB, LENGTH = 16, 31, 12
EXACT = Compute(dtype="float32", operands="float32", unroll=True)
PLAIN = Compute("float32", "float32", unroll=True, fused=False)
OTHER = Compute(
    "float32", "float32", unroll=False, rematerialise=True, attention_chunk=4, loss_chunk=5
)
CUTS = [0, 4, 5, LENGTH]
"""Where the documents of a packed row begin and end."""

ATTENTIONS: dict[str, AnyAttention] = {
    "gqa": Grouped(heads=4, kv_heads=2, head_dim=8),
    "mqa": Grouped(heads=4, kv_heads=1, head_dim=8),
    "gqa-dressed": Grouped(
        heads=4,
        kv_heads=2,
        head_dim=8,
        norm=RMSNorm(stored="offset"),
        softcap=2.0,
        scale=0.5,
        sinks="learned",
        gate="channel",
        biases=("query", "key", "value", "output"),
    ),
    "shared-kv": SharedKV(heads=4, kv_heads=2, head_dim=8),
    "shared-kv-normed": SharedKV(heads=4, kv_heads=1, head_dim=8, norm=RMSNorm()),
    "latent": Latent(heads=4, rank=12, head_dim=6, rope_dim=4, head_value_dim=5, query_rank=10),
    "tied": GroupedTied(heads=4, kv_heads=2, head_dim=8, gate="head"),
    "tensor-product": TensorProduct(heads=4, head_dim=8, query_rank=3, rank=2),
    "hca": HCA(
        heads=4,
        head_dim=8,
        rope_dim=4,
        query_rank=10,
        window=4,
        every=3,
        groups=2,
        output_rank=6,
        sinks="learned",
    ),
}
POSITIONS: dict[str, AnyPosition] = {
    "nope": NoPE(),
    "rope": RoPE(),
    "rope-llama3": RoPE(base=100.0, scaling=Llama3(factor=4.0, original_length=8)),
    "rope-yarn": RoPE(
        base=100.0, scaling=YaRN(factor=4.0, original_length=16, fast=2.0), pairing="interleaved"
    ),
    "p-rope": RoPE(base=100.0, p=0.5),
    "nope-tempered": NoPE(temperature=LogLength(typical=8)),
    "alibi": ALiBi(),
    "cope": CoPE(positions=5),
    "kerple": KERPLE(),
    "fire": FIRE(hidden=6, threshold=99),
}
DRESSES: dict[str, dict[str, Any]] = {
    "gqa-dressed": {
        "norm": RMSNorm(stored="offset"),
        "residual": SandwichNorm(),
        "embedding_scale": "root_width",
        "logit_softcap": 3.0,
    }
}
"""What a model with such an attention has besides."""
MIXED = Stage(
    (
        Layer(),
        Layer(window=3),
        Layer(window=3, reads=-1),
        Layer(position=NoPE()),
    )
)
ROUTED = Experts(experts=5, top_k=2, hidden=12, balance=0.1, z_loss=0.01)
SHARED = Experts(experts=4, top_k=3, hidden=12, shared=1, router="sigmoid", activation="gelu")
PLANS: dict[str, tuple[Stage, ...]] = {
    "mixed": (MIXED,),
    "plain": (Stage(repeats=2),),
    "window": (Stage((Layer(window=3),), repeats=2),),
    "local-global": (Stage((Layer(window=3), Layer()), repeats=2),),
    "reuse": (Stage((Layer(), Layer(reads=-1)), repeats=2),),
    "reuse-window": (Stage((Layer(window=4), Layer(window=4, reads=-1)), repeats=2),),
    "last-layers": (Stage(repeats=2), Stage((Layer(reads=1),), repeats=2)),
    "hybrid": (Stage((Layer(window=5), Layer(position=NoPE())), repeats=1), Stage()),
    "experts": (Stage((Layer(mlp=ROUTED),), repeats=2),),
    "experts-dense": (Stage(), Stage((Layer(window=4), Layer(mlp=SHARED, reads=0)))),
}

PAIRS = max(len(ATTENTIONS), len(POSITIONS))


def drawn(turn: int) -> tuple[str, str, str]:
    """A combination that shares no part with the ones next to it."""
    attentions, positions, plans = list(ATTENTIONS), list(POSITIONS), list(PLANS)[1:]
    position = positions[(turn + turn // PAIRS) % len(positions)]
    return attentions[turn % len(attentions)], position, plans[turn % len(plans)]


REFUSED = {("hca", "cope")}
"""Attentions and positions that can't work together."""
WHOLE = [
    (*pair, "mixed") for pair in itertools.product(ATTENTIONS, POSITIONS) if pair not in REFUSED
]
"""Every attention with every position, in a plan that has windows, reuse and a layer with a
position of its own."""
ALONE = [each for turn in range(2 * PAIRS) if (each := drawn(turn))[:2] not in REFUSED]
"""Every attention, every position and every other plan at least twice, each time with others."""
COMBINATIONS = WHOLE + ALONE
SAMPLE = ALONE[:PAIRS]
"""Every part at least once, for what is too dear to do with every combination."""


def build(attention: str, position: str, plan: str, **changes: object) -> Decoder:
    """The model of one combination."""
    chosen = dataclasses.replace(ATTENTIONS[attention], position=POSITIONS[position])
    model = Decoder(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        attention=chosen,
        mlp=Gated(hidden=24),
        plan=PLANS[plan],
        **DRESSES.get(attention, {}),
    )
    return dataclasses.replace(model, **changes)  # pyright: ignore[reportArgumentType]


CHUNKERS = {
    "fixed": Fixed(size=3),
    "delimiter": Delimiter(delimiters=(0, 3, 4, 7, 8, 11, 12, 15, 20, 22, 26, 29), room=2, span=4),
    "learned": Learned(ratio=2.5, room=2, span=3),
}
POOLS = {
    "sum": Sum(),
    "max": Max(),
    "weighted": Weighted(),
    "attention": Attend(),
    "concatenate": Concatenate(),
    "select": SelectPool(),
}
INJECTIONS = {"residual": Residually(), "prefix": Prefix(slots=2), "cross": Cross()}
CONCEPTS = [
    ("fixed", "sum", "residual"),
    ("fixed", "max", "prefix"),
    ("fixed", "weighted", "cross"),
    ("delimiter", "attention", "residual"),
    ("delimiter", "concatenate", "prefix"),
    ("delimiter", "sum", "cross"),
    ("learned", "select", "residual"),
    ("learned", "weighted", "prefix"),
    ("learned", "max", "cross"),
]
"""Every chunker with every injection, every reduction at least once."""


def concept(chunker: str, pool: str, injection: str, **changes: object) -> Concept:
    """The concept model of one combination: global layers of a width and memory of their own, one
    of which reads another's."""
    local = (Stage((Layer(window=4),)),)
    model = Concept(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        attention=dataclasses.replace(ATTENTIONS["gqa"], position=RoPE()),
        mlp=Gated(hidden=24),
        encoder=local,
        decoder=local,
        chunker=CHUNKERS[chunker],
        pool=POOLS[pool],
        injection=INJECTIONS[injection],
        concepts=Concepts(
            d_model=12,
            attention=Latent(heads=2, rank=8, head_dim=4, rope_dim=2, position=RoPE()),
            mlp=Gated(hidden=20),
            plan=(Stage((Layer(), Layer(reads=-1))),),
        ),
    )
    return dataclasses.replace(model, **changes)  # pyright: ignore[reportArgumentType]


def weights(model: LanguageModel, seed: int = 0) -> dict:
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


def logits(model: LanguageModel, compute: Compute = EXACT) -> Callable[..., jax.Array]:
    """The forward pass of training, compiled: (weights, tokens, position, segment) -> logits."""

    @jax.jit
    def forward(tree: dict, ids: jax.Array, position: jax.Array, segment: jax.Array) -> jax.Array:
        hidden = model.hidden(tree, ids, position, segment, compute)
        return model.logits(tree, hidden, compute)

    return forward


def loss_and_gradient(
    model: LanguageModel, compute: Compute
) -> Callable[..., tuple[jax.Array, dict]]:
    """(weights, tokens) -> summed loss and its gradient, compiled."""

    def loss(tree: dict, ids: jax.Array) -> jax.Array:
        ones = jnp.ones(ids.shape)
        targets = jnp.roll(ids, -1, axis=1)
        return summed_loss(model, tree, ids, targets, ones, compute=compute).objective

    return jax.jit(jax.value_and_grad(loss))


class Case:
    """A model, weights, and logits of the rows that the laws compare.

    whole: two rows. changed: the first with token t another, for each t. alone: its pieces between
    CUTS. packed: these in one row. loss, gradient: of the two rows.
    """

    def __init__(self, model: LanguageModel):
        self.model, self.weights = model, weights(model)
        self.ids = ids = tokens(2)
        changed = np.repeat(ids[:1], LENGTH, axis=0)
        changed[np.diag_indices(LENGTH)] = (ids[0] + 1) % VOCAB
        alone = np.zeros((len(CUTS) - 1, LENGTH), np.int32)
        for row, start, stop in zip(alone, CUTS[:-1], CUTS[1:], strict=True):
            row[: stop - start] = ids[0, start:stop]
        rows = np.concatenate([ids, changed, alone, ids[:1]])
        segment, position = np.zeros_like(rows), np.tile(np.arange(LENGTH), (len(rows), 1))
        lengths = np.diff(CUTS)
        segment[-1] = np.repeat(np.arange(len(lengths)), lengths)
        position[-1] = np.concatenate([np.arange(n) for n in lengths])
        out = np.asarray(logits(model)(self.weights, rows, position, segment))
        self.whole, self.changed = out[:2], out[2 : 2 + LENGTH]
        self.alone, self.packed = out[2 + LENGTH : -1], out[-1]
        self.loss, self.gradient = loss_and_gradient(model, PLAIN)(self.weights, ids)
