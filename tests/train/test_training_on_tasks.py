"""`mukv train CONFIG data.task=...` trains on a synthetic task."""

from __future__ import annotations

import json

import numpy as np
import pytest

from mukv.runs import loaded
from mukv.storage.weights import load_weights
from mukv.tasks import TASKS
from mukv.tasks.feed import TaskBatches, as_batch
from tests.conftest import MINUSCULE

TASK = "data.task={kind: needle, filler: 4}"


@pytest.mark.product
def test_train_and_resume(mukv, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = ("train", "tiny", *MINUSCULE, TASK, "train.schedule={kind: inverse_sqrt}")
    done = mukv(*given, "--out", whole, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["step"] == 3
    for steps in (2, 3):
        done = mukv(*given, f"train.steps={steps}", "--out", parts)
        assert done.returncode == 0, done.stderr
    one, other = (load_weights(folder / "weights")[0] for folder in (whole, parts))
    np.testing.assert_array_equal(one["embedding"], other["embedding"])
    model = loaded.load(whole)
    task = model.run.data.task
    assert task is not None
    row = task.batch(64, 0, "test", np.arange(1)).tokens[0]
    np.testing.assert_array_equal(model.tokenizer.encode(task.render(row)), row)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("train.length=8", TASK), "at least the 15 tokens of data.task"),
        (("data.task={kind: mqar, values: 900}", "model.vocab_size=100"), "of data.task"),
        (("data.task={kind: needles}",), "needle"),
        (("data.task={kind: needle, fact: 2}",), "facts"),
        (("data.path=x", TASK), "one of the two"),
    ],
)
def test_bad_input(mukv, tmp_path, given, said):
    done = mukv("train", "tiny", *MINUSCULE, *given, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert said in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.product
def test_the_coordinate_check_takes_a_task(mukv, tmp_path):
    sizes = ("--widths", "32,64", "--seeds", 1, "--steps", 1)
    given = (*MINUSCULE, TASK, "--check", *sizes, "--out", tmp_path / "plot.png", "--json")
    done = mukv("transfer", "tiny", *given)
    assert json.loads(done.stdout.splitlines()[-1])["slopes"], done.stderr
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_batches():
    task = TASKS["needle_multi_query"]
    source = TaskBatches(task, seed=1, batch=6, length=100, split="train")
    whole = source.at(3)
    halves = [source.at(3, host, 2) for host in range(2)]
    for field in whole._fields:
        joined = np.concatenate([getattr(half, field) for half in halves])
        np.testing.assert_array_equal(joined, getattr(whole, field))
    samples = task.batch(100, 1, "train", np.arange(18, 24))
    batch = as_batch(samples)
    assert batch.weight.sum() == (samples.stop - samples.start).sum()
    learnt = batch.weight > 0
    np.testing.assert_array_equal(batch.targets[learnt], samples.tokens[samples.graded])
    assert len(list(source.once(2))) == 2
