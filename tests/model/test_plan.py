"""A layer plan is resolved to what each layer is, or refused with the layer's number."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mukv.attention import Grouped, Indexer, Latent
from mukv.core.errors import BadInput
from mukv.model.block import Gated
from mukv.model.plan import Layer, Stage, resolve, scannable
from mukv.position import CoPE, NoPE, RoPE

ATTENTION, MLP = Grouped(heads=2, kv_heads=1, head_dim=4), Gated(hidden=8)
OTHER = Grouped(heads=2, kv_heads=2, head_dim=4)
INDEXED = Latent(heads=2, rank=4, head_dim=4, rope_dim=2, query_rank=4, indexer=Indexer(width=2))
CHOOSES, CHOSEN = Layer(attention=INDEXED), Layer(attention=INDEXED, indexed_by=-1)


def layers(*stages):
    return resolve(stages, ATTENTION, MLP)


def test_places():
    found = layers(Stage((Layer(), Layer(window=3)), repeats=2), Stage())
    places = [(layer.index, layer.stage, layer.repeat, layer.slot) for layer in found]
    assert places == [(0, 0, 0, 0), (1, 0, 0, 1), (2, 0, 1, 0), (3, 0, 1, 1), (4, 1, 0, 0)]
    assert [layer.window for layer in found] == [None, 3, None, 3, None]
    assert all(layer.writes and layer.reads is None for layer in found)


def test_a_layer_takes_from_the_model_what_it_leaves_open():
    wide = Gated(hidden=16)
    first, second, third = layers(
        Stage((Layer(), Layer(attention=OTHER, position=RoPE()), Layer(mlp=wide)))
    )
    assert (first.attention, first.mlp) == (ATTENTION, MLP)
    assert (second.attention.kv_heads, second.attention.position) == (2, RoPE())
    assert (third.attention, third.mlp) == (ATTENTION, wide)


@pytest.mark.parametrize(
    ("reads", "targets", "sources"),
    [
        ([None, -1, -1, -3], [None, 0, 1, 0], [0, 0, 0, 0]),
        ([None, 0, None, 2], [None, 0, None, 2], [0, 0, 2, 2]),
        ([None, None, 0, -2], [None, None, 0, 1], [0, 1, 0, 1]),
    ],
)
def test_reads_and_their_sources(reads, targets, sources):
    found = layers(Stage(tuple(Layer(reads=number) for number in reads)))
    assert [layer.reads for layer in found] == targets
    assert [layer.source for layer in found] == sources
    assert [layer.writes for layer in found] == [number is None for number in reads]


def test_a_choice_is_that_of_the_layer_with_an_indexer():
    found = layers(Stage((CHOOSES, CHOSEN, CHOSEN), repeats=2), Stage((CHOOSES,)))
    assert [layer.indexed_by for layer in found] == [None, 0, 0, None, 3, 3, None]
    assert [layer.most for layer in found] == [None, 64, 64, None, 64, 64, None]
    assert [layer.attention.indexer is None for layer in found] == [*[False, True, True] * 2, False]
    assert [layer.chooses for layer in found] == [*[True, False, False] * 2, False]


def test_what_a_layer_lends():
    found = layers(Stage((Layer(), Layer(), Layer(reads=0), Layer(reads=2))))
    assert [layer.lends for layer in found] == [True, False, False, False]


def pattern(*pattern: Layer, repeats: int = 1) -> Stage:
    return Stage(pattern, repeats)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([pattern(Layer(reads=-1))], "reads -1.*layer 0.*it is the first"),
        ([pattern(Layer(), Layer(reads=1))], "reads 1.*layer 1.*0 to 0, or -1 to -1"),
        ([pattern(Layer(), Layer(reads=-2))], "reads -2.*layer 1"),
        ([pattern(Layer()), pattern(Layer(reads=5))], "reads 5.*layer 1"),
        ([pattern(Layer(window=0))], "window 0.*layer 0.*at least 1"),
        ([pattern(Layer(window=4), Layer(reads=0))], "layer 1 reads layer 0, whose window is 4"),
        ([pattern(Layer(), Layer(window=4, reads=0))], "window 4.*whose window is None"),
        ([pattern(Layer(), Layer(attention=OTHER, reads=0))], "kv_heads 2.*other entries.*1"),
        ([pattern(Layer(), Layer(position=RoPE(), reads=0))], "layer 1.*other entries"),
        (
            [pattern(Layer(), Layer(attention=INDEXED, position=CoPE()))],
            "position cope.*layer 1 needs an encoding whose bias",
        ),
        ([pattern(CHOSEN)], "indexed_by -1.*layer 0.*first"),
        ([pattern(CHOOSES, replace(CHOSEN, indexed_by=2), CHOOSES)], "indexed_by 2.*layer 1.*0"),
        ([pattern(Layer(), CHOSEN)], "indexed_by 0 in layer 1.*with an indexer, not grouped"),
        (
            [pattern(Layer(attention=replace(INDEXED, indexer=None)), CHOSEN)],
            "indexed_by 0 in layer 1.*with an indexer, not latent",
        ),
        (
            [pattern(CHOOSES, Layer(indexed_by=0))],
            "indexed_by 0 in layer 1.*grouped can't read by the choice",
        ),
        (
            [pattern(CHOOSES, replace(CHOSEN, window=3))],
            "indexed_by 0 in layer 1.*same window: None and 3 differ",
        ),
        # A layer without an indexer writes no keys for one.
        ([pattern(CHOOSES, CHOSEN, replace(CHOOSES, reads=1))], "layer 2 reads layer 1.*other"),
    ],
)
def test_a_plan_that_can_not_work(stages, message):
    with pytest.raises(BadInput, match=message):
        layers(*stages)


def test_empty_plans():
    with pytest.raises(BadInput, match="pattern"):
        Stage(())
    with pytest.raises(BadInput, match="repeats: got 0"):
        Stage(repeats=0)


@pytest.mark.parametrize(
    ("stages", "expected"),
    [
        ([pattern(Layer(), repeats=3)], [True]),
        ([pattern(Layer(), Layer(position=NoPE()), repeats=2)], [True]),
        ([pattern(Layer(), Layer(reads=-1), repeats=2)], [True]),  # inside its repeat
        ([pattern(Layer()), pattern(Layer(reads=0), repeats=2)], [False, True]),  # one fixed layer
        ([pattern(Layer(), Layer(reads=0), repeats=2)], [False]),  # crosses a repeat
        (
            [pattern(Layer(), repeats=2), pattern(Layer(reads=1))],
            [False, True],
        ),  # read from outside
        ([pattern(Layer(), repeats=2), pattern(Layer(reads=-2), repeats=2)], [False, False]),
        ([pattern(CHOOSES, CHOSEN, CHOSEN, repeats=2)], [True]),
        ([pattern(CHOOSES, repeats=2), pattern(CHOSEN, repeats=2)], [False, True]),
        ([pattern(CHOOSES), pattern(replace(CHOSEN, indexed_by=0), repeats=2)], [False, True]),
        ([pattern(CHOOSES, replace(CHOSEN, indexed_by=0), repeats=2)], [False]),
    ],
)
def test_scannable(stages, expected):
    found = layers(*stages)
    assert [scannable(number, found) for number in range(len(stages))] == expected
