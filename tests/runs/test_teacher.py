"""Runs with `train.teacher`: what they write, how they continue, and which teachers are refused."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from mukv.core.params import named
from mukv.data.build import build_tokens
from mukv.storage.weights import load_weights, save_weights

pytestmark = pytest.mark.xdist_group("trained")
SHORT = ("train.steps=3", "train.log_every=1", "train.checkpoint_every=2")


@pytest.mark.product
def test_a_run_names_its_teacher_and_continues_with_the_same_one(mukv, trained, tmp_path):
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(trained, teacher)
    line = ("train", trained, f"train.start={trained}", f"train.teacher={teacher}", *SHORT)
    done = mukv(*line, "--out", out, "train.distillation.weight=1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    # The student starts from its teacher's weights.
    assert abs(lines[0]["divergence"]) < 1e-4
    assert lines[0]["gradient_norm"] < 1e-2
    assert lines[0]["loss"] > 1
    record = json.loads((out / "provenance.json").read_text())
    assert record["teacher"] == str(teacher)
    assert len(record["teacher_checksum"]) == 64
    assert (
        named(load_weights(out / "weights")[0]).keys()
        == named(load_weights(trained / "weights")[0]).keys()
    )
    # The run is used without its teacher; to continue it, the same teacher is needed, at any path.
    moved = tmp_path / "moved"
    teacher.rename(moved)
    text = tmp_path / "a.txt"
    text.write_text("Some text to be read. " * 20)
    assert mukv("eval", out, "--text", text).returncode == 0
    done = mukv("train", out, "train.steps=4")
    assert done.returncode == 2
    assert f"train.teacher: got '{teacher}'; a run directory" in done.stderr
    done = mukv("train", out, "train.steps=4", f"train.teacher={moved}")
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "provenance.json").read_text())["teacher"] == str(moved)
    shutil.rmtree(moved / "checkpoints")
    weights, metadata = load_weights(moved / "weights")
    weights["embedding"] = weights["embedding"] * np.float32(1.5)
    save_weights(moved / "weights", weights, metadata)
    done = mukv("train", out, "train.steps=5")
    assert done.returncode == 2
    assert "began with a teacher of checksum" in done.stderr
    done = mukv("train", out, "train.steps=5", "train.teacher=null")
    assert done.returncode == 2
    assert "train.teacher: got None; the run in" in done.stderr


@pytest.mark.product
def test_a_teacher_that_does_not_fit_is_refused(mukv, trained, token_file, tmp_path):
    (tmp_path / "a.txt").write_text("A text of letters, which is long enough. " * 60)
    tokens = build_tokens([str(tmp_path / "a.txt")], tmp_path / "tokens", "bpe:260").path
    out, sweep = tmp_path / "out", tmp_path / "sweep"
    mine = f"train.teacher={trained}"
    for changes, told in (
        (("train.teacher=nowhere",), "train.teacher: got 'nowhere'; a run directory"),
        ((f"train.teacher={out}",), "another model than the run itself"),
        ((mine, f"data.path={tokens}"), "with the tokenizer of the data"),
        ((mine, "model.vocab_size=272"), "a model with the 272 ids"),
        ((mine, "train.distillation.weight=2"), "weight: got 2"),
    ):
        done = mukv("train", trained, *changes, "--out", out)
        assert done.returncode == 2, told
        assert told in done.stderr
        assert not out.exists()
    # Before data are read, which can take minutes.
    done = mukv("train", "tiny", "train.teacher=nowhere", "--out", out)
    assert done.stderr.startswith("error: train.teacher: got 'nowhere'")
    rates = "train.learning_rate=0.001,0.01"
    path = f"data.path={token_file}"
    done = mukv("sweep", "tiny", path, mine, rates, "train.steps=2", "--out", sweep)
    assert done.returncode == 2
    assert "train.teacher: got" in done.stderr
