"""Length stages: rows get longer at equal tokens per step, in one run."""

from __future__ import annotations

import pytest

from mukv.core.errors import BadInput
from mukv.runs import config, notes
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import open_feed
from mukv.runs.train import train_run
from mukv.train import loop
from mukv.train.metrics import read_metrics
from mukv.train.training import LengthStage, Training
from mukv.tuning.together import Point, Together
from tests.conftest import MINUSCULE
from tests.processes import contents

STAGES = "train.stages=[{begin: 2, length: 16}, {begin: 3, length: 32}]"
SHORT = ("train.batch=4", "train.length=8", "train.schedule={kind: inverse_sqrt, warmup: 1}")
SHORT += ("train.log_every=1", "train.evaluate_every=1", "train.checkpoint_every=1")


def load(token_file, *overrides):
    return config.load("tiny", [*MINUSCULE, f"data.path={token_file}", *SHORT, STAGES, *overrides])


@pytest.mark.product
def test_a_run_through_its_stages_and_its_resumption(token_file, tmp_path, monkeypatch):
    """Rows get longer at the given steps, in training and validation; a run resumed in a later
    stage ends with the bits of an uninterrupted one."""
    seen: list[tuple[int, int]] = []
    put = loop.Trainer.put
    monkeypatch.setattr(
        loop.Trainer,
        "put",
        lambda self, batch: seen.append(batch.tokens.shape) or put(self, batch),
    )
    whole, parts = (RunDirectory(tmp_path / name) for name in ("whole", "parts"))
    train_run(load(token_file, "train.steps=4", "train.validation_batches=1"), whole)
    shapes = [(4, 8)] * 2 + [(2, 16)] + [(1, 32)]
    assert seen == [shape for each in shapes for shape in (each, each)]
    records = list(read_metrics(whole.path / "metrics.jsonl"))
    assert [row["tokens"] for row in records if "loss" in row] == [32, 64, 96, 128]
    for steps in (3, 4):
        train_run(load(token_file, f"train.steps={steps}", "train.validation_batches=1"), parts)
    assert contents(parts.weights) == contents(whole.weights)
    with pytest.raises(BadInput, match=r"train\.stages\.1\.begin: got None"):
        train_run(load(token_file, "train.stages=[{begin: 2, length: 16}]"), whole)


def test_the_plan_of_each_stage():
    plan = Training(batch=8, length=4, stages=(LengthStage(3, 8), LengthStage(5, 32)))
    assert plan.sizes == ((8, 4), (4, 8), (1, 32))
    assert [plan.stage_at(step) for step in range(7)] == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ("train.stages=[{begin: 2, length: 12}]",),
            r"stages\.0\.length: got 12; a multiple.*\(8\)",
        ),
        (("train.stages=[{begin: 2, length: 8}]",), r"stages\.0\.length: got 8.*and longer"),
        (("train.stages=[{begin: 2, length: 64}]",), r"8 times as long.*must divide.*\(4\)"),
        (("train.stages=[{begin: 2, length: 24}]",), r"3 times as long.*must divide.*\(4\)"),
        (("train.accumulate=2",), r"stages\.1\.length.*4 times as long.*\(2\)"),
        (("train.stages.1.begin=2",), r"stages\.1\.begin: got 2; more than 2"),
        (("train.stages.0.begin=0",), r"begin: got 0; at least 1"),
        (("model.context=16",), r"train\.stages\.1\.length: got 32; at most model\.context \(16\)"),
    ],
)
def test_stages_that_do_not_fit(token_file, overrides, says):
    with pytest.raises(BadInput, match=says):
        load(token_file, *overrides)


def test_rows_of_each_stage_must_fit_the_mesh(token_file, tmp_path):
    run = load(token_file, "mesh.data=2")
    with pytest.raises(BadInput, match=r"multiple of mesh\.data \(2\) at length 32"):
        train_run(run, RunDirectory(tmp_path / "run"))


def test_a_stage_that_never_begins_is_reported(token_file):
    assert any("never begins" in line for line in notes.of_run(load(token_file, "train.steps=3")))
    assert not notes.of_run(load(token_file, "train.steps=4"))


def test_points_of_a_sweep_have_rows_of_one_length(token_file):
    run = load(token_file)
    with pytest.raises(BadInput, match=r"train\.stages.*trained together"):
        Together([Point(run.model, run.train)], open_feed(run)[1])
