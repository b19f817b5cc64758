"""The coordinate check passes parameterisations that transfer and fails others."""

from __future__ import annotations

import dataclasses
import json

import pytest

from mukv.core.errors import BadInput
from mukv.scaling import parameterization
from mukv.scaling.optimizers import AdamAtan2
from mukv.train.adapter import Adapter
from mukv.train.training import Training
from mukv.tuning import coordinates
from tests.laws import matrix
from tests.laws.matrix import SAMPLE_CONCEPTS as CONCEPTS
from tests.pairs import params
from tests.training import EXACT, batch

MODEL = matrix.build("gqa", "rope", "plain")
TRAINING = Training(
    batch=8, length=matrix.LENGTH, compute=EXACT, optimizer=AdamAtan2(weight_decay=0.0)
)


def slopes(model=MODEL, **scaling):
    """Return the slopes of the outputs of attention and MLP, sorted."""
    model = dataclasses.replace(model, scaling=dataclasses.replace(model.scaling, **scaling))
    found = coordinates.check(model, TRAINING, batch(0), (16, 64), seeds=2, steps=6)
    return sorted(each.slope for each in found if each.name.endswith(("attention", "mlp")))


@pytest.mark.product
@pytest.mark.parametrize("kind", ["sp", "mup"])
def test_full_alignment_is_flat(kind):
    found = slopes(kind=kind)
    assert max(map(abs, found)) < coordinates.LIMIT


ATTENTIONS = [*matrix.ATTENTIONS][1:]


@pytest.mark.parametrize("attention", params(ATTENTIONS, []))
def test_every_attention_is_flat(attention):
    found = slopes(matrix.build(attention, "rope", "plain"), kind="mup")
    assert max(map(abs, found)) < coordinates.LIMIT


@pytest.mark.parametrize("combination", params(CONCEPTS, [], "-".join))
def test_concepts_are_flat(combination):
    found = slopes(matrix.concept(*combination), kind="mup")
    assert max(map(abs, found)) < coordinates.LIMIT


ADAPTER_LIMIT = 0.1
"""Slopes of adapters, at a rate at which training is stable at every width: 0.05 with the rates of
LoRA+, 0.13 with one rate for all widths."""


def adapter_slopes(**scaling):
    """Return slopes of attention and MLP where only the adapters of a random model are trained."""
    training = dataclasses.replace(TRAINING, adapter=Adapter(rank=2))
    model = dataclasses.replace(MODEL, scaling=dataclasses.replace(MODEL.scaling, **scaling))
    found = coordinates.check(
        model, training, batch(0), (16, 64, 256), seeds=2, steps=6, learning_rate=2.0**-7
    )
    return sorted(each.slope for each in found if each.name.endswith(("attention", "mlp")))


@pytest.mark.product
@pytest.mark.parametrize("kind", params(["sp", "mup"], ["mup"]))
def test_adapters_are_flat(kind):
    found = adapter_slopes(kind=kind)
    assert max(map(abs, found)) < ADAPTER_LIMIT


@pytest.mark.product
def test_one_rate_for_both_thin_weights_is_caught():
    """With one rate for both, the first thin weight changes its output more in wider models, and
    the check fails (Hayou et al. 2024)."""
    assert adapter_slopes(alignment="ignored")[-1] > ADAPTER_LIMIT


@pytest.mark.parametrize(
    ("middle", "passed", "sure"), [(0.1, True, True), (0.3, False, False), (0.5, False, True)]
)
def test_a_wide_interval_is_no_verdict(middle, passed, sure):
    for sign in (-1, 1):
        slope = sign * middle
        found = coordinates.Slope("mlp", slope, slope - 0.2, slope + 0.2, coordinates.LIMIT, {})
        assert (found.passed, found.sure) == (passed, sure)


@pytest.mark.product
def test_one_rate_for_all_widths_is_caught():
    assert slopes(alignment="ignored")[-1] > coordinates.LIMIT


@pytest.mark.product
def test_a_rate_half_an_exponent_off_is_caught(monkeypatch):
    rates = parameterization.LEARNING_RATES["adam", "full"]
    embedding, hidden, readout = rates["sp"]
    monkeypatch.setitem(rates, "sp", (embedding, hidden + 0.5, readout))
    assert slopes()[-1] > coordinates.LIMIT


@pytest.mark.product
def test_a_deviation_that_was_meant_as_a_variance_is_caught(monkeypatch):
    embedding, (a, b), readout = parameterization.EXPONENTS["sp"]
    monkeypatch.setitem(parameterization.EXPONENTS, "sp", (embedding, (a, 2 * b), readout))
    assert slopes()[0] < -coordinates.LIMIT


def test_a_slope_is_fitted_with_its_interval():
    seen = {width: [{"x": width**0.5 * noise} for noise in (0.9, 1.1)] for width in (4, 8, 16)}
    found = coordinates.fit("x", seen)
    assert found.slope == pytest.approx(0.5)
    assert found.low < 0.5 < found.high
    assert not found.passed


def test_the_command(mukv, token_file, tmp_path):
    plot = tmp_path / "plot.png"
    changes = ("train.batch=2", "train.length=16", "model.plan=[{}]", f"data.path={token_file}")
    done = mukv(
        *("transfer", "tiny", *changes, "model.scaling.kind=mup", "--check", "--widths", "64,128"),
        *("--seeds", 1, "--steps", 1, "--out", plot, "--json"),
    )
    facts = json.loads(done.stdout.splitlines()[-1])
    assert done.returncode == (0 if facts["passed"] else 1)
    assert {"slope", "low", "high"} <= facts["slopes"]["layer0.mlp"].keys()
    assert plot.stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--widths", "64,x", "--check"], "--widths: got '64,x'; whole numbers"),
        (["--widths", "64", "--check"], "at least two"),
        (["--widths", "100,200", "--check"], "heads would be"),
    ],
)
def test_bad_input(mukv, token_file, changes, message):
    done = mukv("transfer", "tiny", f"data.path={token_file}", *changes)
    assert done.returncode == 2
    assert message in done.stderr


def test_widths_are_checked():
    with pytest.raises(BadInput, match="seeds: got 0"):
        coordinates.check(MODEL, TRAINING, batch(0), (16, 32), seeds=0)
