"""Run directories that training writes are read by `mukv.load` and by other commands."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import mukv as package
from mukv.core.params import named
from mukv.data.tokens import open_tokens
from mukv.runs import config
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import resolve
from mukv.runs.train import train_run
from mukv.storage.weights import load_weights
from tests.conftest import MINUSCULE

pytestmark = pytest.mark.xdist_group("trained")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """Return a copy of the minuscule run, which tests may write to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_configuration_names_its_folder():
    given = [resolve("tiny", overrides, None) for overrides in ([], ["train.seed=1"], [])]
    paths = [folder.path for _, folder in given]
    assert paths[0] == paths[2] != paths[1]
    assert paths[0].parent == Path("runs")
    assert paths[0].name.startswith("tiny-")
    assert resolve("tiny", [], Path("here"))[1] == RunDirectory(Path("here"))


def test_a_run_is_a_configuration(run, token_file):
    loaded, folder = resolve(str(run), ["train.steps=9"], None)
    assert folder.path == run
    assert loaded.train.steps == 9
    expected = config.load("tiny", [*MINUSCULE, f"data.path={token_file}"])
    assert folder.load_config() == expected
    assert resolve(str(run), [], run / "new")[1].path == run / "new"


@pytest.mark.product
def test_the_corpus_is_kept_by_its_whole_path(run, token_file, monkeypatch):
    monkeypatch.chdir(token_file.parent)
    continued = resolve(str(run), [f"data.path={token_file.name}"], None)
    assert train_run(*continued).step == 3


def test_provenance(run, token_file):
    record = json.loads((run / "provenance.json").read_text())
    assert record["data_fingerprint"] == open_tokens(token_file).fingerprint
    assert record["mukv"] == package.__version__
    assert {"commit", "jax", "python", "devices", "processes", "started"} <= record.keys()


@pytest.mark.product
def test_a_longer_run_goes_on_where_the_shorter_ended(mukv, run):
    before = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    done = mukv("train", run, "train.steps=5", "train.log_every=1")
    assert done.returncode == 0, done.stderr
    assert "step 5" in done.stdout
    after = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert after[: len(before)] == before
    assert {line["step"] for line in after[len(before) :]} == {4, 5}
    assert RunDirectory(run).load_config().train.steps == 5
    assert load_weights(run / "weights")[1]["step"] == "5"


@pytest.mark.product
def test_lines_that_are_no_metrics_are_passed_over(mukv, run):
    lines = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(f'{lines}[1]\n{{"step": "x"}}\n{{"st')
    assert mukv("train", run).returncode == 0
    assert (run / "metrics.jsonl").read_text().startswith(lines)


@pytest.mark.product
def test_the_newest_weights_are_loaded(mukv, run, trained):
    assert mukv("train", run, "train.steps=5").returncode == 0
    newest = load_weights(run / "weights")[0]
    shutil.rmtree(run / "weights")
    from_checkpoint = package.load(run).weights
    shutil.copytree(trained / "weights", run / "weights")
    for weights in (from_checkpoint, package.load(run).weights):
        for name, leaf in named(newest).items():
            np.testing.assert_array_equal(named(weights)[name], leaf)
    shutil.rmtree(run / "checkpoints")
    old = named(package.load(run).weights)
    assert (old["embedding"] != newest["embedding"]).any()


def test_logits(trained):
    model = package.load(trained)
    ids = model.encode("Déjà vu")
    one = model.logits(ids)
    assert one.shape == (1, len(ids), model.network.vocab_size)
    assert one.dtype == jnp.float32
    two = model.logits([ids, ids[::-1]])
    np.testing.assert_allclose(two[:1], one, atol=1e-5)


def test_the_package_shows_load_and_model_only():
    assert package.Model.__name__ == "Model"
    with pytest.raises(AttributeError, match="lood"):
        _ = package.lood
