"""Every part in a table of the package is in the matrix of the laws."""

from __future__ import annotations

import itertools

import pytest

from mukv.attention import ATTENTIONS
from mukv.core.errors import BadInput
from mukv.core.table import kind_of
from mukv.model import MODELS
from mukv.model.block import RESIDUALS
from mukv.model.concept.chunkers import CHUNKERS
from mukv.model.concept.injection import INJECTIONS
from mukv.model.concept.pooling import POOLS
from mukv.model.feedforward import FEEDFORWARDS
from mukv.position import POSITIONS
from mukv.position.rope_scaling import SCALINGS
from mukv.scaling.budget import BUDGETS
from mukv.scaling.optimizers import OPTIMIZERS
from mukv.scaling.parameterization import Scaling
from mukv.scaling.rows import EXPONENTS
from mukv.scaling.schedules import SCHEDULES
from mukv.tasks import TASK_KINDS
from mukv.train.adapters import ADAPTERS
from tests.laws import matrix, test_fields

TABLES = (
    *(ATTENTIONS, POSITIONS, SCALINGS, OPTIMIZERS, SCHEDULES, BUDGETS, FEEDFORWARDS),
    *(CHUNKERS, POOLS, INJECTIONS, RESIDUALS, MODELS, TASK_KINDS, ADAPTERS),
)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.part)
def test_a_name_in_a_table_is_the_kind_of_its_class(table):
    for kind, cls in table.items():
        assert kind_of(cls) == kind
        assert issubclass(cls, table.base)


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
def test_every_part_is_in_the_matrix(table, parts):
    assert set(table.values()) == {type(part) for part in parts.values()}


@pytest.mark.parametrize("table", [OPTIMIZERS, SCHEDULES])
def test_the_fields_of_every_part_are_changed(table):
    assert set(table.values()) <= test_fields.classes()


def test_every_parameterization_can_be_chosen():
    for kind in EXPONENTS:
        assert Scaling(kind=kind).kind == kind
    with pytest.raises(BadInput, match="allowed: custom, mean_field, mup, ntk, sp"):
        Scaling(kind="mupp")


def test_every_feedforward_part_is_in_the_matrix():
    rows = [row for row in matrix.PRODUCT if row[:2] == ("gqa", "rope")]
    layers = itertools.chain(*(matrix.build(*row).layers for row in rows))
    assert {type(layer.mlp) for layer in layers} == set(FEEDFORWARDS.values())


def test_concept_models_that_are_left_out_are_refused():
    left = {*itertools.product(*matrix.CONCEPT_AXES.values())} - {*matrix.CONCEPTS}
    assert len(left) == 6
    for row in left:
        with pytest.raises(BadInput, match="divides d_model"):
            matrix.concept(*row)


def test_plans_have_windows_reuse_and_both():
    seen = {
        (layer.window is not None, layer.reads is not None)
        for stages in matrix.PLANS.values()
        for stage in stages
        for layer in stage.pattern
    }
    assert len(seen) == 4
