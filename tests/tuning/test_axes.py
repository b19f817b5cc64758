"""The runs along width, depth, batch and horizon."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.scaling.budget import HyperP
from mukv.scaling.schedules import Cosine
from mukv.train.training import Training
from mukv.tuning import coordinates
from mukv.tuning.axes import along
from tests.laws import matrix
from tests.laws.test_parameterizations import scaled
from tests.training import EXACT, batch
from tests.tuning.test_coordinates import TRAINING
from tests.tuning.test_transfer import planted, search

MODEL = matrix.build("gqa", "rope", "plain")
PLAN = Training(steps=60, batch=8, schedule=Cosine(warmup=6), validation_batches=10)


def test_depths_have_a_base():
    """The number of layers of the shallowest model is the base, or else the given one."""
    model = scaled(MODEL, depth=1.0)
    base, points = along("depth", (4, 8), model, PLAN)
    assert len(base.model.layers) == 4
    assert [len(point.model.layers) for point in points.values()] == [4, 8]
    factors = [named(p.model.resolved())["stage0.slot0.mlp.down"] for p in points.values()]
    assert [each.multiplier for each in factors] == [1, 0.5]
    given = points[4].model.scaling.base | {"layer": 2}
    _, points = along("depth", (4, 8), scaled(model, base=given), PLAN)
    factors = [named(p.model.resolved())["stage0.slot0.mlp.down"] for p in points.values()]
    assert [each.multiplier for each in factors] == [0.5, 0.25]


def test_widths_keep_the_depth_in_the_base():
    _, points = along("width", (16, 32), scaled(MODEL, depth=1.0), PLAN)
    assert points[32].model.scaling.base["layer"] == len(MODEL.layers)


def test_batches_read_as_many_rows():
    """In training and in validation; the warm-up stays the same share of the steps."""
    _, points = along("batch", (4, 16), MODEL, PLAN)
    found = [
        (p.training.batch, p.training.steps, p.training.schedule.warmup) for p in points.values()
    ]
    assert found == [(4, 120, 12), (16, 30, 3)]
    assert [p.training.validation_batches for p in points.values()] == [20, 5]


def test_horizons_change_the_steps_and_the_budget_the_rate():
    tokens = PLAN.batch * PLAN.length
    plan = replace(PLAN, budget=HyperP(batch=tokens, tokens=tokens * 60))
    _, points = along("horizon", (60, 240), MODEL, plan)
    near, far = (point.training for point in points.values())
    assert (near.steps, far.steps, far.schedule.warmup) == (60, 240, 24)
    assert near.effective.learning_rate == pytest.approx(plan.learning_rate)
    assert far.effective.learning_rate == pytest.approx(plan.learning_rate * 4**-0.32)


@pytest.mark.parametrize(
    ("axis", "values"), [("depth", (2, 4, 8)), ("batch", (1, 2)), ("horizon", (2, 4, 8))]
)
def test_a_planted_drift_is_found_along_each_axis(token_file, tmp_path, axis, values):
    found = planted(search(token_file, tmp_path, values, axis=axis), -0.5)
    assert found.drift == pytest.approx(-0.5, abs=1e-6)
    assert not found.passed


STEEP = 0.5


@pytest.mark.product
@pytest.mark.parametrize(("depth", "flat"), [(1.0, True), (None, False)])
def test_completep_is_flat_over_depth(depth, flat):
    """Without it, the residual stream changes more in deeper models."""
    model = scaled(MODEL, kind="mup", depth=depth)
    plan = replace(TRAINING, compute=EXACT)
    found = coordinates.check(model, plan, batch(0), (2, 8), seeds=1, steps=4, axis="depth")
    names = {each.name for each in found}
    assert {"layer0.mlp", "layer1.mlp", "logits"} <= names
    assert not any(name.startswith("layer2") for name in names)
    steepest = max(each.slope for each in found if each.name.endswith("mlp"))
    assert (steepest < coordinates.LIMIT) if flat else (steepest > STEEP)


@pytest.mark.parametrize(
    ("axis", "values", "message"),
    [
        ("depth", (4,), "depths: got .*at least two"),
        ("depth", (0, 2), "depths: got 0; at least 1"),
        ("depth", (6, 8), "depths: got 6; 4 layers times a ratio"),
        ("batch", (7, 8), r"batches: got 7; a divisor of the rows .*\(480\)"),
        ("horizon", (60,), "horizons: got .*at least two"),
    ],
)
def test_values_that_do_not_fit_are_refused(axis, values, message):
    with pytest.raises(BadInput, match=message):
        along(axis, values, matrix.build("gqa", "rope", "mixed"), PLAN)


def test_the_command_takes_one_axis(mukv, token_file):
    given = ("transfer", "tiny", f"data.path={token_file}")
    for changes, message in (
        (("--depths", "2,4", "--horizons", "4,8"), "--horizons: got '4,8'; not with --depths"),
        (("--batches", "2,4", "--check"), "--check: got batch; width or depth"),
        (("--depths", "2,x"), "--depths: got '2,x'; whole numbers"),
    ):
        done = mukv(*given, *changes)
        assert done.returncode == 2
        assert message in done.stderr.replace("'batch'", "batch")
