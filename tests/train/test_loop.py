"""The training loop: signals, numbers that are not finite, evaluation, kept checkpoints."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from mukv.train.step import Trainer
from tests.conftest import MINUSCULE
from tests.pairs import params
from tests.processes import contents, finish, start


def arguments(token_file: Path, out: Path, *changes: str) -> list[object]:
    return ["train", "tiny", *MINUSCULE, *changes, f"data.path={token_file}", "--out", out]


def refuse(constant: str) -> None:
    raise AssertionError(f"{constant} is not JSON")


def records(run: Path) -> list[dict]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


@pytest.mark.parametrize("name", params(["SIGTERM", "SIGINT"], ["SIGTERM"]))
def test_a_signal_saves_and_leaves(token_file, tmp_path, name):
    changes = ("train.steps=4000", "train.log_every=1")
    process = start(*arguments(token_file, tmp_path / "run", *changes), "--json")
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(getattr(signal, name))
    status, out, error = finish(process)
    assert status == 0, error
    facts = json.loads(out)
    assert not facts["finished"]
    assert (tmp_path / "run" / "checkpoints" / str(facts["step"])).is_dir()
    assert f"{name}: saved step {facts['step']}, leaving" in " ".join(error.split())


@pytest.mark.product
def test_a_stopped_run_ends_in_the_same_bits(mukv, token_file, tmp_path, monkeypatch):
    """A run stopped by a signal in step 3 is saved before the next logged step, and continues to
    the same bits."""
    changes = ("train.steps=6", "train.log_every=100")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert mukv(*arguments(token_file, whole, *changes)).returncode == 0
    step = Trainer.step

    def signalled(self, state, number, batch):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, state, number, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", signalled)
        done = mukv(*arguments(token_file, parts, *changes), "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["step"], facts["finished"]) == (3, False)
    done = mukv(*arguments(token_file, parts, *changes), "--json")
    assert json.loads(done.stdout.splitlines()[-1])["finished"]
    assert contents(parts / "weights") == contents(whole / "weights")


@pytest.mark.product
def test_a_run_in_two_parts_is_one_run(mukv, token_file, tmp_path):
    """A run continued after a kill has the metrics and weights of an undisturbed one."""
    changes = ("train.steps=6", "train.log_every=1", "train.checkpoint_every=3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert mukv(*arguments(token_file, whole, *changes)).returncode == 0
    shutil.copytree(whole, parts)
    # What a kill after step 5 leaves: the checkpoint of step 3, and lines beyond it.
    shutil.rmtree(parts / "checkpoints" / "6")
    shutil.rmtree(parts / "weights")
    assert mukv(*arguments(token_file, parts, *changes)).returncode == 0
    assert contents(parts / "weights") == contents(whole / "weights")
    steps = [record["step"] for record in records(parts) if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]


def failure(done) -> str:
    """Assert that there is one error line, and return it."""
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.stderr.endswith(f"{line}\n")
    return line


@pytest.mark.product
def test_a_number_that_is_not_finite_stops_the_run(mukv, token_file, tmp_path):
    """A NaN stops the run; the saved weights of step 1, which cause it, are not called good."""
    run = tmp_path / "run"
    changes = ("train.steps=8", "train.checkpoint_every=1", "train.log_every=1")
    wild = ("train.learning_rate=1e38", "train.clip_norm=null")
    line = failure(mukv(*arguments(token_file, run, *changes, *wild)))
    assert re.match(r"error: step 2: not a finite number in the \S+ of \S+; ", line), line
    assert line.endswith(f"there is no good checkpoint in {run}")
    assert [record["step"] for record in records(run)] == [1]
    assert not (run / "weights").exists()


@pytest.mark.product
def test_the_layer_and_the_last_good_checkpoint_are_named(mukv, token_file, tmp_path, monkeypatch):
    """The error names the layer with the bad weight; nothing of later steps is logged or saved."""
    run, step = tmp_path / "run", Trainer.step
    changes = ("train.steps=9", "train.checkpoint_every=3", "train.log_every=2")

    def spoilt(self, state, number, batch):
        if number == 4:
            up = state.weights["stage0"]["slot0"]["mlp"]["up"]
            state.weights["stage0"]["slot0"]["mlp"]["up"] = up.at[1].set(float("nan"))
        return step(self, state, number, batch)

    monkeypatch.setattr(Trainer, "step", spoilt)
    line = failure(mukv(*arguments(token_file, run, *changes)))
    assert line == (
        "error: step 5: not a finite number in the output of layer1.mlp; "
        f"the last good checkpoint is 3 in {run}"
    )
    assert [record["step"] for record in records(run)] == [1, 2, 4]
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["3"]


@pytest.mark.product
def test_kept_checkpoints(mukv, token_file, tmp_path):
    run = tmp_path / "run"
    changes = ("train.steps=6", "train.checkpoint_every=1", "train.evaluate_every=1")
    done = mukv(*arguments(token_file, run, *changes, "train.keep_last=2", "train.keep_best=1"))
    assert done.returncode == 0
    kept = {int(path.name) for path in (run / "checkpoints").iterdir() if path.is_dir()}
    scores = [(r["validation_loss"], r["step"]) for r in records(run) if "validation_loss" in r]
    assert [step for _, step in scores] == [1, 2, 3, 4, 5, 6]
    assert kept == {5, 6, min(scores)[1]}


@pytest.mark.product
def test_it_is_evaluated_when_due_and_at_the_end(mukv, token_file, tmp_path):
    changes = ("train.steps=5", "train.evaluate_every=2", "train.log_every=1")
    assert mukv(*arguments(token_file, tmp_path / "run", *changes)).returncode == 0
    seen = records(tmp_path / "run")
    assert [record["step"] for record in seen if "validation_loss" in record] == [2, 4, 5]
    assert [record["step"] for record in seen if "loss" in record] == [1, 2, 3, 4, 5]


@pytest.mark.product
def test_an_ended_run_says_so_again_and_another_is_refused(mukv, token_file, tmp_path):
    first = mukv(*arguments(token_file, tmp_path / "run"), "--json")
    before = contents(tmp_path / "run")
    for change in ("train.seed=1", "train.learning_rate=1", "model.d_model=64"):
        done = mukv(*arguments(token_file, tmp_path / "run", change))
        assert done.returncode == 2
        assert f"error: {change.split('=')[0]}: got" in done.stderr
        assert "another folder with --out" in done.stderr
        assert contents(tmp_path / "run") == before
    again = mukv(*arguments(token_file, tmp_path / "run"), "--json")
    one, two = (json.loads(done.stdout.splitlines()[-1]) for done in (first, again))
    assert one["step"] == two["step"] == 3
    for name in ("loss", "validation_loss", "validation_bits_per_byte"):
        assert one[name] == two[name]


@pytest.mark.product
def test_a_profile_is_written(mukv, token_file, tmp_path):
    changes = ("train.steps=18", "train.profile=true")
    done = mukv(*arguments(token_file, tmp_path / "run", *changes))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
