"""A part that is in a table of the house is in the matrix that the laws walk."""

from __future__ import annotations

from typing import get_args, get_type_hints

import pytest

from mukv.attention import ATTENTIONS
from mukv.core.table import kind_of
from mukv.model import MODELS
from mukv.model.block import RESIDUALS
from mukv.model.concept.chunkers import CHUNKERS
from mukv.model.concept.injection import INJECTIONS
from mukv.model.concept.pooling import POOLS
from mukv.position import POSITIONS
from mukv.position.rope_scaling import SCALINGS
from mukv.scaling.budget import BUDGETS
from mukv.scaling.optimizers import OPTIMIZERS
from mukv.scaling.parameterization import EXPONENTS, Scaling
from mukv.scaling.schedules import SCHEDULES
from mukv.tasks import TASK_KINDS
from tests.laws import matrix, test_fields

TABLES = (
    *(ATTENTIONS, POSITIONS, SCALINGS, OPTIMIZERS, SCHEDULES, BUDGETS),
    *(CHUNKERS, POOLS, INJECTIONS, RESIDUALS, MODELS, TASK_KINDS),
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
def test_the_laws_walk_every_part(table, parts):
    assert set(table.values()) == {type(part) for part in parts.values()}


@pytest.mark.parametrize("table", [OPTIMIZERS, SCHEDULES])
def test_the_fields_of_every_part_are_changed(table):
    assert set(table.values()) <= test_fields.classes()


def test_every_parameterization_can_be_chosen():
    assert {*EXPONENTS, "custom"} == set(get_args(get_type_hints(Scaling)["kind"]))


def test_plans_have_windows_reuse_and_both():
    seen = {
        (layer.window is not None, layer.reads is not None)
        for stages in matrix.PLANS.values()
        for stage in stages
        for layer in stage.pattern
    }
    assert len(seen) == 4
