"""Figures on the pages of reproductions equal those computed from their results files."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

HERE = Path(__file__).parents[1] / "reproductions"


def load(name: str):
    spec = importlib.util.spec_from_file_location(f"reproductions_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def claims():
    """Yield the module, imported with its folder on the path."""
    sys.path.insert(0, str(HERE))
    yield load("claims")
    sys.path.remove(str(HERE))


PAGES = [HERE, *sorted(page.parent for page in HERE.glob("*/README.md"))]


@pytest.mark.parametrize("folder", PAGES, ids=lambda folder: folder.name)
def test_a_page_says_what_its_results_hold_and_nothing_beyond(claims, folder):
    assert not claims.faults((folder / "README.md").read_text(), claims.of(folder))


def test_every_finding_is_in_the_overview(claims):
    overview = (HERE / "README.md").read_text()
    assert all(f"]({folder.name}/)" in overview for folder in PAGES if folder != HERE)


@pytest.mark.parametrize(
    ("page", "told"),
    [
        ("It needs 27 % more steps.", []),
        ("It needs 28 % more steps.", ["not on the page", "28"]),
        ("It needs 27 % more steps. It needs 27 % more steps.", ["no claim has: 27"]),
        ("It needs 27 % more steps, and loses 0.02.", ["no claim has: 0.02"]),
        ("It needs 27 % more steps, 38 times faster.", ["no claim has: 38"]),
        ("It **needs 27 %**\nmore steps with `keydiff:0.5`.\n\n    run --rate 0.1\n", []),
        ("It needs 27 % more steps.\n\n| a | 1,024 |\n", ["no claim has: |1,024|"]),
    ],
)
def test_a_figure_that_no_claim_has_is_found(claims, page, told):
    found = claims.faults(page, ["needs 27 % more steps"])
    assert bool(found) == bool(told)
    assert all(any(part in fault for fault in found) for part in told)


def test_a_claim_is_a_sentence(claims):
    assert claims.faults("It loses 27 %.", ["27 %"])[0].startswith("no words")


def test_a_table_on_the_page_is_the_table_of_the_claim(claims):
    made = claims.table(["model", "loss"], [["GQA", "2.41"], ["MQA", ""]])
    page = "Seen:\n\n| model | loss |\n|---|---|\n| **GQA** | **2.41** |\n| MQA | |\n"
    assert not claims.faults(page, [made])
    assert claims.faults(page.replace("2.41", "2.42"), [made])
    assert claims.faults(page.replace("| MQA | |", "| MQA | 2.5 |"), [made])


def test_intervals_of_steps_contain_the_known_distance(claims):
    """Intervals of a known distance of 27 % of the steps contain it in about 95 % of 400 draws, and
    are as wide as four standard deviations over the draws."""
    intervals, draw = load("intervals"), np.random.default_rng(0)
    steps = np.arange(20, 401, 20)

    def variant(shift: float, deviation: float, seeds: int = 3) -> dict:
        ends = shift + deviation * draw.standard_normal(seeds)
        mean = 6 - 0.6 * np.log(steps)
        curve = dict(zip(map(str, steps), mean + ends.mean(), strict=True))
        return {"curve": curve, "by_seed": (mean[-1] + ends).tolist()}

    exact = intervals.extra_steps(
        {int(s): 6 - 0.6 * np.log(s / 1.27) for s in steps},
        {int(s): 6 - 0.6 * np.log(s) for s in steps},
    )
    assert exact == pytest.approx(0.27, abs=1e-6)
    seen, inside = [], 0
    for _ in range(400):
        mine, other = variant(0.6 * np.log(1.27), 0.03, 8), variant(0.0, 0.03, 8)
        low, high = intervals.steps_interval(mine, other)
        curves = [{int(k): v for k, v in row["curve"].items()} for row in (mine, other)]
        seen.append(intervals.extra_steps(*curves))
        inside += low <= 0.27 <= high
    assert high - low == pytest.approx(4 * np.std(seen), rel=0.5)
    assert 0.9 < inside / 400 < 0.99


def test_an_interval_of_texts_is_wider_than_that_of_answers(claims):
    """Intervals that resample texts are wider if answers about one text are correlated."""
    intervals = load("intervals")
    low, high = intervals.resampled([6] * 48 + [0] * 16, 6)
    share = 0.75
    by_text = 1.96 * np.sqrt(share * (1 - share) / 64)
    assert (share - low, high - share) == pytest.approx((by_text, by_text), rel=0.15)


def results(name: str):
    return json.loads((HERE / name / "results.json").read_text())


def test_the_command_of_mqar_makes_the_rows_that_are_there():
    run = load("mqar/run")
    made = {tuple(row[key] for key in run.KEYS) for row in results("mqar")}
    assert made == set(run.plan(large=False))


@pytest.mark.parametrize("name", ["positions", "attention-memory"])
def test_the_command_of_a_comparison_on_tasks_makes_the_rows_that_are_there(name):
    asked = yaml.safe_load((HERE / name / "cpu.yaml").read_text())
    rows = results(name)
    assert {row["variant"] for row in rows} == set(asked["variants"])
    assert {row["task"] for row in rows} == set(asked["tasks"])
    assert {row["length"] for row in rows} == set(asked["lengths"])


def test_what_one_parameterisation_adds_leaves_the_others():
    run = load("lr-transfer/run")
    before = {"muP": {"optima": {"64": 1, "128": 1}}, "one rate for all": {"optima": {"64": 1}}}
    more, fewer = {"optima": {"64": 2, "128": 2, "256": 2}}, {"optima": {"64": 2}}
    assert run.merged(before, {"muP": more}) == {**before, "muP": more}
    assert run.merged(before, {"muP": fewer}) == before
    assert run.merged(before, {"one rate for all": fewer})["one rate for all"] is fewer
