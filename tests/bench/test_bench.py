"""`mukv bench` of configurations and of models."""

from __future__ import annotations

import json

import pytest

from mukv.bench.examine import ExamineSettings
from mukv.bench.trial import Trial
from mukv.core.errors import Failed
from mukv.runs import config
from mukv.tasks import TASKS
from mukv.train.loop import Outcome
from mukv.train.state import State
from tests.conftest import MINUSCULE

SMALL = ("--samples", "10", "--free", "3", "--json")


def rows_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["rows"]


@pytest.mark.product
def test_a_configuration_then_its_model(mukv, tmp_path):
    given = ("bench", "tiny", *MINUSCULE, "--tasks", "needle", "--lengths", "32,64", "--seeds", "1")
    out = tmp_path / "out"
    done = mukv(*given, "--learning-rates", "1e-3,1e-2", "--out", out, *SMALL)
    rows = rows_of(done)
    assert [(row["task"], row["length"]) for row in rows] == [("needle", 32), ("needle", 64)]
    for row in rows:
        assert row["oracle"] == 1
        assert 0 <= row["exact_match"] <= row["partial"] <= 1
        # Two layers, one KV head of 16 numbers, keys and values, float32, and a few counters.
        assert 256 <= row["cache_bytes_per_token"] < 257
        assert row["learning_rate"] in (1e-3, 1e-2)
    seen = json.loads((out / "needle.json").read_text())
    assert len(seen["rates"]) == 2
    assert len(seen["seeds"][0]["every"]) == 10
    assert (out / "benchmark.png").stat().st_size > 10_000
    run = out / "runs" / "needle" / "rate-0.01-seed-0"
    (row,) = rows_of(mukv("bench", run, "--lengths", "64", "--out", tmp_path / "model", *SMALL))
    evicting = ("--cache", "streaming:16", "--lengths", "64", "--out", tmp_path / "policy")
    (less,) = rows_of(mukv("bench", run, *evicting, *SMALL))
    assert less["cache_bytes_per_token"] < row["cache_bytes_per_token"]
    assert less["answers"] == 3
    if seen["rows"][1]["learning_rate"] == 1e-2:
        assert row["exact_match"] == rows[1]["exact_match"]
        assert row["bits"] == pytest.approx(rows[1]["bits"])


def test_a_model_that_is_not_trained_to_the_end_is_not_judged(monkeypatch, tmp_path):
    stopped = Outcome(State({}, {}, 7), 7, 1.0, None, None, 0.0, 0.0, finished=False)
    monkeypatch.setattr("mukv.bench.trial.train_run", lambda *_, **__: stopped)
    run = config.load("tiny", MINUSCULE)
    trial = Trial(run, (32, 64), (1e-2,), 1, tmp_path, ExamineSettings(4, free=0))
    with pytest.raises(Failed, match="stopped at step 7; the same command goes on"):
        trial.examine("needle", TASKS["needle"])


@pytest.mark.product
def test_a_model_of_text_reads_text(mukv, trained, tmp_path):
    asked = ("--tasks", "needle,flip_flop", "--form", "text", "--lengths", "320")
    given = (*asked, "--out", tmp_path / "out")
    rows = rows_of(mukv("bench", trained, *given, *SMALL))
    assert [row["task"] for row in rows] == ["needle", "flip_flop"]
    assert all(row["length"] == 320 for row in rows)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((), "MODEL, CONFIG or --oracle"),
        (("tiny", "--oracle"), "one of them"),
        (("tiny", "--learning-rates", "fast"), "numbers with commas"),
        (("tiny", "--learning-rates", "-1"), "greater than 0"),
        (("tiny", "--seeds", "0"), "at least 1"),
        (("tiny", "--cache", "none"), "allowed: adaptive, all, chunk"),
        (("tiny", "--lengths", "8", "--tasks", "needle"), "at least 15"),
        (("tiny", "--free", "-1"), "at least 0"),
        (("tiny", "--free", "0", "--cache", "int8"), "a cache policy changes"),
        (("tiny", "--facts", "90", "--tasks", "mqar"), "at least facts"),
        (("tiny", "model.context=128", "--lengths", "128,256"), "context"),
        (("tiny", "--growing", "--tasks", "counting", "--lengths", "80,160"), "vocabulary"),
        (("tinny",), "tiny"),
    ],
)
def test_bad_input(mukv, tmp_path, given, said):
    done = mukv("bench", *given, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()
