"""What a run is made of and what it was trained on is what it was, or that is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mukv as package
from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.core.weights import FILE, load_weights, save_weights
from tests.conftest import MINUSCULE

pytestmark = pytest.mark.xdist_group("trained")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy of the minuscule run, to be written to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def told(done, *parts: str, status: int = 2) -> None:
    """One line of error with these parts."""
    lines = done.stderr.splitlines()
    assert done.returncode == status, done.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
    assert [part for part in parts if part not in lines[-1]] == [], lines[-1]


def rewritten(run: Path, change) -> None:
    """The weights of a run with one of them changed; the newest checkpoint is older."""
    tree, metadata = load_weights(run / "weights")
    tree["readout"] = change(tree["readout"])
    save_weights(run / "weights", tree, metadata)


def commands(run: Path, tmp_path: Path) -> dict[str, tuple[object, ...]]:
    (tmp_path / "a.txt").write_text("some text")
    return {
        "eval": ("eval", run, "--text", tmp_path / "a.txt"),
        "generate": ("generate", run, "--prompt", "a", "--max-tokens", 2),
        "export": ("export", run, "--out", tmp_path / "exported"),
        "start": ("train", "tiny", *MINUSCULE, f"train.start={run}", "--out", tmp_path / "new"),
    }


@pytest.mark.parametrize("name", ["eval", "generate", "export", "start"])
def test_a_flipped_bit_of_an_exponent_is_told(mukv, run, token_file, tmp_path, name):
    path = run / "weights" / FILE
    data = bytearray(path.read_bytes())
    data[-1] ^= 64
    path.write_bytes(data)
    extra = [f"data.path={token_file}"] if name == "start" else []
    done = mukv(*commands(run, tmp_path)[name], *extra)
    told(done, str(path), "a damaged file", "its checksum is crc32:")
    assert not (tmp_path / "exported").exists()


@pytest.mark.parametrize("name", ["eval", "generate", "export", "start"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_told(mukv, run, token_file, tmp_path, name, value):
    rewritten(run, lambda weight: np.where(weight == weight.max(), value, weight))
    extra = [f"data.path={token_file}"] if name == "start" else []
    done = mukv(*commands(run, tmp_path)[name], *extra)
    told(done, str(run), "readout", "infinite or not a number", "--allow-nonfinite")


def test_weights_that_are_not_finite_are_taken_when_asked(mukv, run, tmp_path):
    rewritten(run, lambda weight: weight * np.float32(np.nan))
    for name in ("eval", "generate", "export"):
        given = "--json" if name == "eval" else "--allow-nonfinite"
        done = mukv(*commands(run, tmp_path)[name], "--allow-nonfinite", given)
        assert done.returncode == 0, done.stderr
        if name == "eval":
            facts = json.loads(done.stdout.splitlines()[-1])
            assert (facts["loss"], facts["perplexity"]) == (None, None)
    model = package.load(run, allow_nonfinite=True)
    assert np.isnan(named(model.weights)["readout"]).all()
    with pytest.raises(BadInput, match="infinite or not a number"):
        package.load(run)
    # What was exported is imported in the same way.
    made = ("import", tmp_path / "exported", "--out", tmp_path / "imported")
    told(mukv(*made), "exported: readout", "infinite or not a number")
    assert not (tmp_path / "imported").exists()
    assert mukv(*made, "--allow-nonfinite").returncode == 0


@pytest.mark.parametrize("dtype", ["int32", "int8"])
@pytest.mark.parametrize("name", ["eval", "start"])
def test_weights_of_integers_are_told(mukv, run, token_file, tmp_path, name, dtype):
    rewritten(run, lambda weight: weight.astype(dtype))
    extra = [f"data.path={token_file}"] if name == "start" else []
    done = mukv(*commands(run, tmp_path)[name], *extra)
    told(done, "readout", dtype, "floating point")


def test_a_step_that_is_no_number_is_told(mukv, run, tmp_path):
    for step in ("three", "-1", "9" * 400, "³"):
        save_weights(run / "weights", load_weights(run / "weights")[0], {"step": step})
        told(mukv(*commands(run, tmp_path)["eval"]), "weights: step", step[:9])
