"""Combinations of attention, position and layer plan, at tiny size.

The laws are tested on every pair of parts in `make test`, on every triple in `make test-all`. A new
part joins by a line in its own table here; test_matrix.py fails if a table has no line for a part.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mukv.attention import (
    CSA,
    HCA,
    AnyAttention,
    Attention,
    GatedDelta,
    Grouped,
    GroupedTied,
    Indexer,
    KimiDelta,
    Latent,
    SharedKV,
    TensorProduct,
)
from mukv.core import params
from mukv.core.compute import Compute
from mukv.core.norm import RMSNorm
from mukv.model import Decoder, LanguageModel, Layer, Stage
from mukv.model.block import Gated, PostNorm, SandwichNorm, Ungated
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
    ResidualInjection,
    SelectPool,
    Sum,
    Weighted,
)
from mukv.model.experts import Experts
from mukv.model.layer_inputs import LayerInputs
from mukv.model.loss import summed_loss
from mukv.model.mlp_and_experts import MLPAndExperts
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
from tests.pairs import Part, cover

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
    "mqa": Grouped(heads=4, kv_heads=1, head_dim=8, norm=RMSNorm(), norm_over="projection"),
    "gqa-dressed": Grouped(
        heads=4,
        kv_heads=2,
        head_dim=8,
        norm=RMSNorm(stored="offset"),
        norm_values=True,
        softcap=2.0,
        scale=0.5,
        sinks="learned",
        gate="channel",
        biases=("query", "key", "value", "output"),
    ),
    "shared-kv": SharedKV(heads=4, kv_heads=2, head_dim=8),
    "shared-kv-normed": SharedKV(heads=4, kv_heads=1, head_dim=8, norm=RMSNorm()),
    "latent": Latent(heads=4, rank=12, head_dim=6, rope_dim=4, head_value_dim=5, query_rank=10),
    "latent-indexed": Latent(
        heads=4,
        rank=12,
        head_dim=6,
        rope_dim=4,
        query_rank=10,
        indexer=Indexer(heads=3, width=6, top_k=3),
    ),
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
    "csa": CSA(
        heads=4,
        head_dim=8,
        rope_dim=4,
        query_rank=10,
        window=4,
        every=2,
        groups=2,
        output_rank=6,
        sinks="learned",
        indexer=Indexer(heads=3, width=6, top_k=2),
    ),
    # The norm of a head's output would magnify the rounding of outputs that are tiny.
    "gated-delta": GatedDelta(
        heads=4, key_heads=2, head_dim=8, head_value_dim=6, taps=3, beta=2, norm=RMSNorm(1e-3)
    ),
    "kimi-delta": KimiDelta(heads=4, head_dim=6, taps=3, norm=RMSNorm(1e-3)),
}
STATES = [name for name, each in ATTENTIONS.items() if not isinstance(each, Attention)]
"""Mixers with states, which take no position and which no other layer can read. In a model with one
of them, the layers with a window and those that take part in reuse have the attention "gqa"."""
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
    },
    "mqa": {"residual": PostNorm()},
    "shared-kv": {
        "residual": SandwichNorm(layer_scale=True),
        "layer_inputs": LayerInputs(width=6, embedding_scale="root_width"),
    },
    "latent-indexed": {"layer_inputs": LayerInputs(width=3, activation="silu")},
    "tensor-product": {"norm": RMSNorm(centred=True), "positions": "learned", "context": 512},
}
"""Further fields of a model with this attention."""
MIXED = Stage(
    (
        Layer(),
        Layer(window=3),
        Layer(window=3, reads=-1),
        Layer(position=NoPE()),
    )
)
REUSE = Stage((Layer(), Layer(reads=-1)), repeats=2)
REUSE_WINDOW = Stage((Layer(window=4), Layer(window=4, reads=-1)), repeats=2)
HYBRID = Stage((Layer(window=5), Layer(position=NoPE())))
ROUTED = Experts(experts=5, top_k=2, hidden=12, balance=0.1, z_loss=0.01)
SHARED = Experts(
    experts=6,
    top_k=3,
    hidden=12,
    shared=1,
    shared_gate=True,
    router="sigmoid",
    scale=1.5,
    groups=3,
    top_groups=2,
    choice_bias=True,
    activation="quick_gelu",
    limit=0.5,
    up_offset=1.0,
    biases=True,
)
BESIDE = MLPAndExperts(
    mlp=Gated(hidden=24),
    experts=Experts(experts=5, top_k=2, hidden=12, expert_scale=True),
    norm=RMSNorm(1e-3),
    router_scale=0.5,
)
DENSE_AND_SHARED = Stage((Layer(window=4), Layer(mlp=SHARED, reads=0)))
PLAIN_MLP = Stage((Layer(mlp=Ungated(hidden=24, biases=True)),))
SIMPLE: dict[str, tuple[Stage, ...]] = {
    "plain": (Stage(repeats=2),),
    "window": (Stage((Layer(window=3),), repeats=2),),
    "reuse": (REUSE,),
    "reuse-window": (REUSE_WINDOW,),
    "last-layers": (Stage(repeats=2), Stage((Layer(reads=1),), repeats=2)),
    "hybrid": (HYBRID, PLAIN_MLP),
    "mixed": (MIXED,),
    "experts": (Stage((Layer(mlp=ROUTED),), repeats=2),),
    "experts-dense": (Stage(), DENSE_AND_SHARED),
    "indexed-by": (
        Stage((Layer(), Layer(indexed_by=-1), Layer(reads=-2, indexed_by=-1)), repeats=2),
    ),
}
COMPOSED: dict[str, tuple[Stage, ...]] = {
    "local-global": (Stage((Layer(window=3), Layer()), repeats=2),),
    "reuse-both": tuple(dataclasses.replace(each, repeats=1) for each in (REUSE, REUSE_WINDOW)),
    "hybrid-last": (HYBRID, PLAIN_MLP, Stage((Layer(reads=2),))),
    "experts-both": (
        Stage((Layer(mlp=ROUTED),)),
        Stage((Layer(window=4, mlp=BESIDE), Layer(mlp=SHARED))),
    ),
}
"""The kinds of layers of all simple plans that every attention can have, in fewer models."""
PLANS = COMPOSED | SIMPLE
Combination = tuple[str, str, str]
"""Names of attention, first position, and plan."""
REFUSED = {("hca", "cope"), ("csa", "cope"), ("latent-indexed", "cope")}
"""Attentions and positions that can't work together."""


def hybrid(plan: Sequence[Stage], attention: str) -> tuple[Stage, ...]:
    """Return the plan with the attention "gqa" in layers that can't have the given state."""
    if attention not in STATES:
        return tuple(plan)
    layers = [layer for stage in plan for _ in range(stage.repeats) for layer in stage.pattern]
    read = {
        (index + layer.reads if layer.reads < 0 else layer.reads)
        for index, layer in enumerate(layers)
        if layer.reads is not None
    }
    stages, start = [], 0
    for stage in plan:
        size = len(stage.pattern)
        of_slot = [range(start + slot, start + size * stage.repeats, size) for slot in range(size)]
        pattern = tuple(
            dataclasses.replace(layer, attention=ATTENTIONS["gqa"])
            if layer.window or layer.reads is not None or read & {*indices}
            else dataclasses.replace(layer, position=None)
            for layer, indices in zip(stage.pattern, of_slot, strict=True)
        )
        stages.append(dataclasses.replace(stage, pattern=pattern))
        start += size * stage.repeats
    return tuple(stages)


def fits(row: Combination) -> bool:
    """Return whether the model exists. With a state, the attention layers beside it have RoPE."""
    attention, position, plan = row
    if plan == "indexed-by" and attention != "latent-indexed":
        return False
    if attention not in STATES:
        return (attention, position) not in REFUSED
    layers = [layer for stage in hybrid(PLANS[plan], attention) for layer in stage.pattern]
    return position == "rope" and any(layer.attention is None for layer in layers)


PRODUCT: list[Combination] = [
    row for row in itertools.product(ATTENTIONS, POSITIONS, PLANS) if fits(row)
]


def in_turn(plan: Sequence[Stage], first: str, attention: str) -> tuple[Stage, ...]:
    """Return the plan with a position for every layer.

    Layers without one that write entries take those of the table in turn, beginning with `first`;
    the others take that of the layer they read.
    """
    names = [name for name in POSITIONS if (attention, name) not in REFUSED]
    turn = itertools.cycle(names[names.index(first) :] + names[: names.index(first)])
    layers: list[Layer] = []
    stages: list[Stage] = []
    for stage in hybrid(plan, attention):
        start = len(layers)
        for layer in stage.pattern:
            position = layer.position
            if attention in STATES and layer.attention is None:
                layers.append(layer)
                continue
            if position is None and layer.reads is None:
                position = POSITIONS[next(turn)]
            elif position is None:
                position = layers[layer.reads].position
            layers.append(dataclasses.replace(layer, position=position))
        stages.append(Stage(tuple(layers[start:]), stage.repeats))
        layers += layers[start:] * (stage.repeats - 1)
    return tuple(stages)


def parts(combination: Combination) -> set[tuple[str, str]]:
    """Return the parts of a combination, by axis."""
    attention, first, plan = combination
    stages = in_turn(PLANS[plan], first, attention)
    layers = [layer for stage in stages for layer in stage.pattern]
    known = {position: name for name, position in POSITIONS.items()}
    places = {("position", known[layer.position]) for layer in layers if layer.position}
    return {("attention", attention), ("plan", plan), *places}


QUICK = cover([row for row in PRODUCT if row[2] in COMPOSED], parts)
"""Every pair of attention, position and composed plan at least once."""
COMBINATIONS = {
    *QUICK,
    *cover([row for row in PRODUCT if row[2] in COMPOSED], parts, size=3, searches=1),
    *cover([row for row in PRODUCT if row[2] in SIMPLE], parts, searches=1),
}
"""Every triple of attention, position and composed plan, and every pair with a simple plan. The
layers of a model have several positions, so that one model stands for several triples."""
COMBINATIONS = [row for row in PRODUCT if row in COMBINATIONS]
PROGRAMS = {"forward": 3.0, "decode": 6.5, "gradient": 4.7}
"""The programs that the laws compile for one model, and the seconds that the laws then take on one
core. Each law needs one of them."""


def by_program(rows: Sequence[Any], parts: Callable[[Any], Iterable[Part]]) -> dict[str, list[Any]]:
    """Choose the rows for the quick tests of each program: every two parts occur together under one
    of the programs, and every part under every program."""

    def with_program(pair: tuple[Any, str]) -> Iterable[Part]:
        row, program = pair
        return [*parts(row), ("program", program)]

    pairs = itertools.product(rows, PROGRAMS)
    chosen = cover(pairs, with_program, cost=lambda pair: PROGRAMS[pair[1]])
    return {name: [row for row, program in chosen if program == name] for name in PROGRAMS}


QUICK_BY_PROGRAM = by_program(QUICK, parts)
SAMPLE = cover(QUICK_BY_PROGRAM["gradient"], parts, size=1)
"""Every part at least once, for tests that are too slow for every pair. The gradients of these rows
are compiled anyway."""


def rounded(weights: Any, seed: int) -> Any:
    """Return weights that are each off by one unit in the last place, up or down at random."""
    random = np.random.default_rng(seed)

    def one(weight: Any) -> np.ndarray:
        weight = np.asarray(weight)
        return np.nextafter(weight, random.choice(np.float32([-np.inf, np.inf]), weight.shape))

    return jax.tree.map(one, weights)


def build(attention: str, position: str, plan: str, **changes: object) -> Decoder:
    """Make the model of one combination; its layers have the positions from `position` on."""
    chosen = ATTENTIONS[attention]
    if isinstance(chosen, Attention):
        chosen = dataclasses.replace(chosen, position=POSITIONS[position])
    model = Decoder(
        vocab_size=VOCAB,
        d_model=D_MODEL,
        attention=chosen,
        mlp=Gated(hidden=24),
        plan=in_turn(PLANS[plan], position, attention),
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
INJECTIONS = {"residual": ResidualInjection(), "prefix": Prefix(slots=2), "cross": Cross()}
CONCEPT_AXES = {"chunker": CHUNKERS, "pool": POOLS, "injection": INJECTIONS}
CONCEPTS = [
    row
    for row in itertools.product(*CONCEPT_AXES.values())
    if row[1] != "concatenate" or row[0] == "delimiter"
]
"""Concatenation needs a span that divides d_model, which that of the delimiters does."""


def concept_parts(row: tuple[str, str, str]) -> list[tuple[str, str]]:
    """Return the parts of a concept model, by axis."""
    return [*zip(CONCEPT_AXES, row, strict=True)]


QUICK_CONCEPTS = cover(CONCEPTS, concept_parts)
"""Every two parts of a concept model occur together."""
QUICK_CONCEPTS_BY_PROGRAM = by_program(QUICK_CONCEPTS, concept_parts)
SAMPLE_CONCEPTS = cover(QUICK_CONCEPTS_BY_PROGRAM["gradient"], concept_parts, size=1)
"""Every part at least once."""


def concept(chunker: str, pool: str, injection: str, **changes: object) -> Concept:
    """Make the concept model of one combination: global layers have their own width and memory, and
    one of them reads another's entries."""
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
    """Draw random weights of a model."""
    return drawn(model.params(), seed)


def drawn(declared: Any, seed: int = 0) -> dict:
    """Draw random weights, gains too, since a one or a zero could hide an error."""
    random = np.random.default_rng(seed)

    def draw(param: params.Param) -> np.ndarray:
        found = param.fan_in_size**-0.5 * random.standard_normal(param.shape)
        if param.init == "ones":
            # A gain near zero would hide what it multiplies.
            found = 1 + np.clip(found, -0.9, 0.9)
        return found.astype(np.float32)

    return params.map_params(draw, declared)


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    ids = np.random.default_rng(100 + seed).integers(0, VOCAB, (rows, length))
    return ids.astype(np.int32)


def logits(model: LanguageModel, compute: Compute = EXACT) -> Callable[..., jax.Array]:
    """Compile the training forward pass: (weights, tokens, position, segment) -> logits."""

    @jax.jit
    def forward(tree: dict, ids: jax.Array, position: jax.Array, segment: jax.Array) -> jax.Array:
        hidden = model.hidden(tree, ids, position, segment, compute)
        return model.logits(tree, hidden, compute)

    return forward


def loss_and_gradient(
    model: LanguageModel, compute: Compute
) -> Callable[..., tuple[jax.Array, dict]]:
    """Compile the summed loss and its gradient: (weights, tokens) -> (loss, gradient)."""

    def loss(tree: dict, ids: jax.Array) -> jax.Array:
        ones = jnp.ones(ids.shape)
        targets = jnp.roll(ids, -1, axis=1)
        return summed_loss(model, tree, ids, targets, ones, compute=compute).objective

    return jax.jit(jax.value_and_grad(loss))


class Case:
    """A model, weights, and logits of the rows that the laws compare, each computed at first use.

    whole: two rows. changed: the first row, with token t changed in row t. alone: its pieces
    between
    CUTS. packed: the pieces in one row. loss, gradient: those of the two rows.
    """

    def __init__(self, model: LanguageModel):
        self.model, self.weights = model, weights(model)
        self.ids = tokens(2)

    @cached_property
    def _forward(self) -> Callable[[dict], np.ndarray]:
        """The training forward pass of all rows: weights -> logits [row token vocab]."""
        ids = self.ids
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
        forward = logits(self.model)
        return lambda tree: np.asarray(forward(tree, rows, position, segment))

    @cached_property
    def _rows(self) -> np.ndarray:
        return self._forward(self.weights)

    @cached_property
    def tolerance(self) -> float:
        """Difference of logits that rounding explains: three times what they change when each
        weight is off by one unit in the last place; at least 2e-5, and at most 1e-3, since a choice
        of entries or experts may flip. In some of the random models one token magnifies rounding a
        hundred times."""
        changes = [
            np.abs(self._forward(rounded(self.weights, seed)) - self._rows).max()
            for seed in range(4)
        ]
        return float(np.clip(3 * max(changes), 2e-5, 1e-3))

    @property
    def whole(self) -> np.ndarray:
        return self._rows[:2]

    @property
    def changed(self) -> np.ndarray:
        return self._rows[2 : 2 + LENGTH]

    @property
    def alone(self) -> np.ndarray:
        return self._rows[2 + LENGTH : -1]

    @property
    def packed(self) -> np.ndarray:
        return self._rows[-1]

    @cached_property
    def _trained(self) -> tuple[jax.Array, dict]:
        return loss_and_gradient(self.model, PLAIN)(self.weights, self.ids)

    @property
    def loss(self) -> jax.Array:
        return self._trained[0]

    @property
    def gradient(self) -> dict:
        return self._trained[1]
