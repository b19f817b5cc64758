"""The ladder: its presets, and the option `--size` of the findings' commands."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.core.params import count
from mukv.runs import config

HERE = Path(__file__).parents[1] / "reproductions"
WEIGHTS = {
    "1m": 1e6,
    "3m": 3.1e6,
    "12m": 12e6,
    "37m": 37e6,
    "110m": 110e6,
    "270m": 270e6,
    "1b": 1e9,
}


@pytest.fixture(scope="module")
def scripts():
    """Yield the modules ladder, compare and bench, imported with their folder on the path."""
    sys.path.insert(0, str(HERE))
    yield SimpleNamespace(
        **{name: importlib.import_module(name) for name in ("ladder", "compare", "bench")}
    )
    sys.path.remove(str(HERE))


@pytest.mark.parametrize("size", WEIGHTS)
def test_a_size_has_its_parameters_and_twenty_tokens_for_each(size, scripts):
    run = config.load(f"ladder-{size}")
    parameters = count(run.model.params())
    assert parameters == pytest.approx(WEIGHTS[size], rel=0.03)
    assert scripts.ladder.tokens_of(run) / parameters == pytest.approx(20, rel=0.03)
    assert run.model.attention.head_dim == 64
    assert run.train.schedule.warmup == pytest.approx(run.train.steps / 20, rel=0.05)


def test_sizes_are_in_order(scripts):
    assert list(WEIGHTS) == scripts.ladder.SIZES


def test_the_first_size_is_the_base_of_all(scripts):
    model = config.load("ladder-1m").model
    own = scripts.ladder.sizes(model.params()) | {"layer": len(model.layers)}
    for size in WEIGHTS:
        run = config.load(f"ladder-{size}")
        assert run.model.scaling.base == own
        first = config.load("ladder-1m").train
        assert run.train.budget == first.budget
        assert run.train.learning_rate == first.learning_rate
    assert first.effective.learning_rate == first.learning_rate


@pytest.mark.parametrize("name", ["shared-kv", "cross-layer-reuse"])
def test_a_comparison_at_a_size_has_the_variants_of_that_size(name, scripts, monkeypatch, tmp_path):
    text = SimpleNamespace(
        path=tmp_path, split=lambda half: SimpleNamespace(tokens=np.zeros(10**7))
    )
    monkeypatch.setattr(scripts.ladder, "corpus", lambda given: text)
    place = scripts.compare.Place(HERE / name / "cpu.yaml", "1m")
    found = scripts.compare.Comparison.read(place, None)
    small = scripts.compare.Comparison.read(scripts.compare.Place(place.config), None)
    assert list(found.variants) == list(small.variants)
    assert place.results.name == "results-1m.json"
    target = count(config.load("ladder-1m").model.params())
    for variant in found.variants:
        model = config.load(found.base, found.sized(variant)).model
        assert count(model.params()) == pytest.approx(target, rel=0.01)
    rates = len(found.learning_rates)
    assert len(found.sweep()) == rates * len(found.variants)


@pytest.mark.parametrize("name", ["positions", "attention-memory"])
def test_a_comparison_on_tasks_at_a_size_sweeps_every_variant(name, scripts):
    found = scripts.bench.Comparison.read(scripts.compare.Place(HERE / name / "cpu.yaml", "1m"))
    for task in found.tasks:
        for variant in found.variants:
            trial = found.trial(variant, task, Path("unused"))
            assert len(trial.rates) == 4
            assert trial.run.train.steps == config.load("ladder-1m").train.steps


def test_a_larger_size_needs_the_rates_of_the_first(scripts, monkeypatch):
    monkeypatch.setattr(scripts.ladder, "named", lambda path, size: Path("nothing.json"))
    place = scripts.compare.Place(HERE / "positions" / "cpu.yaml", "3m")
    with pytest.raises(BadInput, match="1m first"):
        scripts.bench.Comparison.read(place)


def test_a_comparison_that_states_its_sizes_has_no_other(scripts):
    place = scripts.compare.Place(HERE / "concept-model" / "design.yaml", "1m")
    with pytest.raises(BadInput, match="states the sizes"):
        scripts.compare.Comparison.read(place, None)


def test_comparisons_that_do_not_fit_are_refused(scripts, monkeypatch, capsys):
    ladder, run = scripts.ladder, config.load("ladder-1m")
    machine = ladder.this_machine()
    slow = type(machine)(**{**vars(machine), "flops": 1e9, "memory": 1e9})
    monkeypatch.setattr(ladder, "this_machine", lambda: slow)
    with pytest.raises(BadInput, match="--hours"):
        ladder.require_fits("1m", run, 3, 1, 72)
    assert "hours each" in capsys.readouterr().err
    with pytest.raises(BadInput, match="GiB are free"):
        ladder.require_fits("1m", run, 3, 4, 1e9)
    text = SimpleNamespace(path="text", split=lambda half: SimpleNamespace(tokens=np.zeros(10**6)))
    with pytest.raises(BadInput, match="a token file of at least 5,000,192 tokens"):
        ladder.require_text(run, text)
