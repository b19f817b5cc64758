"""Points that are trained in one program end with the losses of separate runs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from mukv.core.params import named
from mukv.runs import config
from mukv.runs.resolve import open_feed
from mukv.train import metrics
from mukv.tuning.together import Point, Together, grouped
from tests.conftest import MINUSCULE
from tests.pairs import params

POWER = "train.schedule={kind: power, warmup: 1, amplitude: 1, decay: 0.5}"
ATAN2 = "train.optimizer={kind: adam_atan2}"
SCALING = "model.scaling"
TASK = "data.task={kind: needle, filler: 4}"
VARIED = {
    "rates and seeds": (
        ["train.learning_rate=0.01", "train.seed=0"],
        ["train.learning_rate=0.003", "train.seed=1"],
    ),
    "seeds of a task": ([TASK, "train.seed=0"], [TASK, "train.seed=1"]),
    "schedule": (
        [POWER, "train.schedule.exponent=-0.4"],
        [POWER, "train.schedule.warmup=2"],
        [POWER, "train.schedule.decay=0.9"],
    ),
    "optimizer": (
        [ATAN2, "train.optimizer.outer=1"],
        [ATAN2, "train.optimizer.beta2=0.9"],
        [ATAN2, "train.optimizer.weight_decay=1"],
    ),
    "constants": (
        [f"{SCALING}.rate.embedding=4"],
        [f"{SCALING}.multiplier.hidden=0.5"],
        [f"{SCALING}.deviation.readout=0.1"],
    ),
    "budgets": (
        ["train.budget={kind: sde, batch: 64, tokens: 192}"],
        ["train.budget={kind: sde, batch: 128, tokens: 192}"],
    ),
}


def points(token_file, changes):
    given = [*MINUSCULE, "train.compute={dtype: float32}"]
    text = f"data.path={token_file}"
    loaded = [
        config.load("tiny", given + change if TASK in change else [text, *given, *change])
        for change in changes
    ]
    return open_feed(loaded[0])[1], [Point(run.model, run.train) for run in loaded]


def ends(group):
    *_, last = group.run()
    return last.numbers, [named(group.weights(index)) for index in range(len(group.points))]


BOTH = [*itertools.product(VARIED, ("vmap", "map"))]


@pytest.mark.parametrize(("name", "across"), params(BOTH, BOTH[:1], unpack=True))
def test_together_is_alone(token_file, name, across):
    feed, chosen = points(token_file, VARIED[name])
    assert grouped(chosen) == [list(range(len(chosen)))]
    numbers, weights = ends(Together(chosen, feed, across=across))
    assert len({row["validation_loss"] for row in numbers}) == len(chosen)
    for point, row, mine in zip(chosen, numbers, weights, strict=True):
        (alone,), (other,) = ends(Together([point], feed))
        assert row == pytest.approx(alone, rel=1e-4)
        for path, leaf in mine.items():
            np.testing.assert_allclose(leaf, other[path], rtol=1e-2, atol=1e-3, err_msg=path)


@pytest.mark.product
def test_a_point_alone_is_the_run(token_file, trained):
    feed, (point,) = points(token_file, [[]])
    numbers, _ = ends(Together([point], feed))
    last = [r for r in metrics.read_metrics(trained / "metrics.jsonl") if "loss" in r][-1]
    assert numbers[0]["loss"] == pytest.approx(last["loss"], rel=1e-5)


def test_points_that_differ_in_more_than_numbers_are_separate(token_file):
    _, chosen = points(
        token_file, [[], ["model.mlp.hidden=64"], ["train.seed=3"], ["train.clip_norm=null"]]
    )
    assert grouped(chosen) == [[0, 2], [1], [3]]


@pytest.mark.product
def test_a_diverging_point_does_not_change_the_others(token_file):
    feed, chosen = points(token_file, [["train.learning_rate=0.01"], ["train.learning_rate=1e30"]])
    numbers, _ = ends(Together(chosen, feed))
    assert numbers[0]["validation_loss"] < 6
    assert numbers[1]["validation_loss"] == np.inf


@pytest.mark.product
def test_a_group_shrinks_to_its_memory(token_file):
    feed, chosen = points(token_file, [[f"train.seed={seed}"] for seed in range(4)])
    whole = Together(chosen, feed, across="vmap")
    assert whole.fitting(whole.memory()) == [whole]
    parts = whole.fitting(whole.memory() - 1)
    assert [point for part in parts for point in part.points] == chosen
    assert len(parts) == 2
    assert len(whole.fitting(0)) == 4
