"""What happens around the steps of a run: signals, numbers that are not finite, what is kept."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import MINUSCULE
from tests.processes import contents, finish, start


def arguments(token_file: Path, out: Path, *changes: str) -> list[object]:
    return ["train", "tiny", *MINUSCULE, *changes, f"data.path={token_file}", "--out", out]


def records(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
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


def test_a_run_in_two_parts_is_one_run(mukv, token_file, tmp_path):
    """The second part goes on from the checkpoint of the first, which was to be longer."""
    changes = ("train.steps=6", "train.log_every=1", "train.checkpoint_every=3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert mukv(*arguments(token_file, whole, *changes)).returncode == 0
    assert mukv(*arguments(token_file, parts, *changes)).returncode == 0
    # What a kill after step 5 leaves: the checkpoint of step 3, and lines beyond it.
    shutil.rmtree(parts / "checkpoints" / "6")
    shutil.rmtree(parts / "weights")
    assert mukv(*arguments(token_file, parts, *changes)).returncode == 0
    assert contents(parts / "weights") == contents(whole / "weights")
    steps = [record["step"] for record in records(parts) if "loss" in record]
    assert steps == [1, 2, 3, 4, 5, 6]


def test_a_number_that_is_not_finite_stops_the_run(mukv, token_file, tmp_path):
    run = tmp_path / "run"
    changes = ("train.steps=8", "train.checkpoint_every=2", "train.log_every=1")
    wild = ("train.learning_rate=1e38", "train.schedule.warmup=4", "train.clip_norm=null")
    done = mukv(*arguments(token_file, run, *changes, *wild))
    assert done.returncode == 1
    (line,) = done.stderr.strip().splitlines()[-1:]
    assert line.startswith("error: step ")
    assert "not a finite number in the" in line
    assert str(run) in line.replace("\n", "")
    assert not (run / "weights").exists()
    assert all(abs(record["loss"]) < 1e39 for record in records(run) if "loss" in record)


def test_what_is_kept(mukv, token_file, tmp_path):
    run = tmp_path / "run"
    changes = ("train.steps=6", "train.checkpoint_every=1", "train.evaluate_every=1")
    done = mukv(*arguments(token_file, run, *changes, "train.keep_last=2", "train.keep_best=1"))
    assert done.returncode == 0
    kept = {int(path.name) for path in (run / "checkpoints").iterdir() if path.is_dir()}
    seen = {r["step"]: r["validation_loss"] for r in records(run) if "validation_loss" in r}
    assert set(seen) == {1, 2, 3, 4, 5, 6}
    assert kept == {5, 6, min(seen, key=seen.__getitem__)}


def test_an_ended_run_says_so_again(mukv, token_file, tmp_path):
    first = mukv(*arguments(token_file, tmp_path / "run"), "--json")
    again = mukv(*arguments(token_file, tmp_path / "run"), "--json")
    one, two = (json.loads(done.stdout.splitlines()[-1]) for done in (first, again))
    assert one["step"] == two["step"] == 3
    for name in ("loss", "validation_loss", "validation_bits_per_byte"):
        assert one[name] == two[name]


def test_a_profile_is_written(mukv, token_file, tmp_path):
    changes = ("train.steps=18", "train.profile=true")
    done = mukv(*arguments(token_file, tmp_path / "run", *changes))
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
