"""A part that is in a table of the house is in the matrix that the laws walk."""

from __future__ import annotations

import itertools
from typing import get_args, get_type_hints

import pytest

from mukv.attention import ATTENTIONS, AnyAttention
from mukv.model.concept.chunkers import CHUNKERS, AnyChunker
from mukv.model.concept.injection import INJECTIONS, AnyInjection
from mukv.model.concept.pooling import POOLS, AnyPool
from mukv.model.feedforward import FEEDFORWARDS, AnyFeedforward
from mukv.position import POSITIONS, AnyPosition
from mukv.scaling.optimizers import OPTIMIZERS, AnyOptimizer
from mukv.scaling.parameterization import EXPONENTS, Scaling
from mukv.scaling.schedules import SCHEDULES, AnySchedule
from tests.laws import matrix, test_fields

TABLES = {
    "chunker": (CHUNKERS, AnyChunker),
    "pool": (POOLS, AnyPool),
    "injection": (INJECTIONS, AnyInjection),
    "attention": (ATTENTIONS, AnyAttention),
    "position": (POSITIONS, AnyPosition),
    "feedforward": (FEEDFORWARDS, AnyFeedforward),
    "optimizer": (OPTIMIZERS, AnyOptimizer),
    "schedule": (SCHEDULES, AnySchedule),
}


@pytest.mark.parametrize("name", TABLES)
def test_table_and_annotation_agree(name):
    table, annotation = TABLES[name]
    assert set(table.values()) == set(get_args(annotation) or [annotation])
    for kind, cls in table.items():
        assert cls().kind == kind


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        (ATTENTIONS, matrix.ATTENTIONS),
        (POSITIONS, matrix.POSITIONS),
        (CHUNKERS, matrix.CHUNKERS),
        (POOLS, matrix.POOLS),
        (INJECTIONS, matrix.INJECTIONS),
    ],
)
def test_the_laws_walk_every_part(table, parts):
    assert set(table.values()) == {type(part) for part in parts.values()}


@pytest.mark.parametrize("table", [OPTIMIZERS, SCHEDULES])
def test_the_fields_of_every_part_are_changed(table):
    assert set(table.values()) <= test_fields.classes()


def test_every_parameterization_can_be_chosen():
    assert {*EXPONENTS, "custom"} == set(get_args(get_type_hints(Scaling)["kind"]))


def test_the_laws_walk_every_feedforward_part():
    layers = itertools.chain(*(matrix.build("gqa", "rope", plan).layers for plan in matrix.PLANS))
    assert {type(layer.mlp) for layer in layers} == set(FEEDFORWARDS.values())


def test_plans_have_windows_reuse_and_both():
    seen = {
        (layer.window is not None, layer.reads is not None)
        for stages in matrix.PLANS.values()
        for stage in stages
        for layer in stage.pattern
    }
    assert len(seen) == 4


def test_concept_models_have_every_chunker_with_every_injection_and_every_reduction():
    assert {(chunker, injection) for chunker, _, injection in matrix.CONCEPTS} == {
        *itertools.product(matrix.CHUNKERS, matrix.INJECTIONS)
    }
    assert {pool for _, pool, _ in matrix.CONCEPTS} == matrix.POOLS.keys()
