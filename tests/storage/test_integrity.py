"""Changed weights or training data of a run are detected and reported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mukv as package
from mukv.core.errors import BadInput
from mukv.core.params import named
from mukv.storage.weights import FILE, load_weights, save_weights
from tests.conftest import MINUSCULE

pytestmark = pytest.mark.xdist_group("trained")


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """Return a copy of the minuscule run, which tests may write to."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def told(done, *parts: str, status: int = 2) -> None:
    """Assert that there is one error line with these parts."""
    lines = done.stderr.splitlines()
    assert done.returncode == status, done.stderr
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
    assert [part for part in parts if part not in lines[-1]] == [], lines[-1]


def rewritten(run: Path, change) -> None:
    """Save the weights of a run again with one of them changed."""
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


@pytest.mark.product
@pytest.mark.parametrize("name", ["eval", "generate", "export", "start"])
def test_a_flipped_bit_of_an_exponent_is_reported(mukv, run, token_file, tmp_path, name):
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
def test_weights_that_are_not_finite_are_reported(mukv, run, token_file, tmp_path, name, value):
    rewritten(run, lambda weight: np.where(weight == weight.max(), value, weight))
    extra = [f"data.path={token_file}"] if name == "start" else []
    done = mukv(*commands(run, tmp_path)[name], *extra)
    told(done, str(run), "readout", "infinite or not a number", "--allow-nonfinite")


@pytest.mark.product
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


@pytest.mark.product
@pytest.mark.parametrize("dtype", ["int32", "int8"])
@pytest.mark.parametrize("name", ["eval", "start"])
def test_weights_of_integers_are_reported(mukv, run, token_file, tmp_path, name, dtype):
    rewritten(run, lambda weight: weight.astype(dtype))
    extra = [f"data.path={token_file}"] if name == "start" else []
    done = mukv(*commands(run, tmp_path)[name], *extra)
    told(done, "readout", dtype, "floating point")


def test_a_step_that_is_no_number_is_reported(mukv, run, tmp_path):
    for step in ("three", "-1", "9" * 400, "³"):
        save_weights(run / "weights", load_weights(run / "weights")[0], {"step": step})
        told(mukv(*commands(run, tmp_path)["eval"]), "weights: step", step[:9])


# Data


def texts(folder: Path, what: str) -> Path:
    folder.mkdir()
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"{what} number {number}. " * 9)
    return folder


@pytest.fixture(scope="module")
def begun(mukv, tmp_path_factory):
    """Return a folder with a run "made" of two steps on the token file "data" of the texts in
    "one"."""
    folder = tmp_path_factory.mktemp("begun")
    texts(folder / "one", "Déjà vu"), texts(folder / "two", "Jamais vu")
    assert mukv("data", folder / "one", "--out", folder / "data").returncode == 0
    small = (*MINUSCULE, f"data.path={folder / 'data'}")
    done = mukv("train", "tiny", *small, "train.steps=2", "--out", folder / "made")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def resumed(mukv, begun, tmp_path):
    """Return resumed(*changes), which continues a copy of the run on a copy of its data."""
    shutil.copytree(begun, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "made" / "config.yaml"
    config.write_text(config.read_text().replace(str(begun), str(tmp_path)))
    return lambda *changes: mukv("train", tmp_path / "made", "train.steps=3", *changes)


@pytest.mark.product
def test_other_data_at_the_same_path_is_reported(mukv, resumed, tmp_path):
    made = ("data", tmp_path / "two", "--out", tmp_path / "data", "--overwrite")
    assert mukv(*made).returncode == 0
    told(resumed(), "data.path", "made began with data of fingerprint", "--out")


@pytest.mark.product
def test_another_tokenizer_at_the_same_path_is_reported(mukv, resumed, tmp_path):
    made = ("data", tmp_path / "one", "--out", tmp_path / "data", "--tokenizer", "bpe:260")
    assert mukv(*made, "--overwrite").returncode == 0
    told(resumed(), "data.path", "made began with data of fingerprint", "--out")


@pytest.mark.product
def test_the_same_data_may_move(mukv, resumed, tmp_path):
    (tmp_path / "data").rename(tmp_path / "moved")
    told(resumed(), "data.path", "data", "mukv data")
    done = resumed(f"data.path={tmp_path / 'moved'}")
    assert done.returncode == 0, done.stderr
    assert f"path: {tmp_path / 'moved'}" in (tmp_path / "made" / "config.yaml").read_text()


@pytest.mark.product
@pytest.mark.parametrize("name", ["train.bin", "train.starts", "validation.bin", "tokenizer.json"])
def test_a_token_file_that_was_edited_in_place_is_reported(resumed, tmp_path, name):
    """A valid edit that keeps the size is detected by the fingerprint."""
    path = tmp_path / "data" / name
    data = path.read_bytes()
    if name == "train.starts":
        starts = np.frombuffer(data, "<i8").copy()
        starts[1] += 1
        changed = starts.tobytes()
    elif name == "tokenizer.json":
        changed = data.replace(b"{", b"{ ", 1)
    else:
        changed = data.replace(b"u\x00", b"v\x00")
    assert changed != data
    path.write_bytes(changed)
    told(resumed(), str(tmp_path / "data"), "a changed token file", "its fingerprint is")


def test_streams_that_were_swapped_are_reported(resumed, tmp_path):
    data = tmp_path / "data"
    for kind in ("bin", "starts"):
        (data / f"train.{kind}").rename(data / "kept")
        (data / f"validation.{kind}").rename(data / f"train.{kind}")
        (data / "kept").rename(data / f"validation.{kind}")
    told(resumed(), "train.bin", "meta.json says", "truncated, or of another file")


@pytest.mark.product
def test_a_run_without_provenance_gets_an_error_with_the_remedy(resumed, tmp_path):
    path = tmp_path / "made" / "provenance.json"
    path.unlink()
    for content in (None, b"", b"[1]", b"{}", b'{"data_fingerprint": 3}', b"\xff"):
        if content is not None:
            path.write_bytes(content)
        done = resumed()
        told(done, "provenance.json: data_fingerprint", "write {")
    advice = done.stderr.splitlines()[-1]
    path.write_text(advice[advice.index("write {") + 6 : advice.index("}") + 1])
    assert resumed().returncode == 0


@pytest.mark.product
def test_a_run_without_a_saved_step_needs_no_provenance(resumed, tmp_path):
    """A run that was killed before its first checkpoint is continued without provenance.json."""
    made = tmp_path / "made"
    shutil.rmtree(made / "checkpoints")
    (made / "provenance.json").unlink()
    assert resumed().returncode == 0
    assert "data_fingerprint" in (made / "provenance.json").read_text()


@pytest.mark.product
def test_a_task_is_reported_by_its_fingerprint(mukv, tmp_path):
    out = tmp_path / "task"
    task = ("data.task={kind: mqar}", "train.length=128", "model.vocab_size=512")
    begun = ("train", "tiny", *MINUSCULE, *task, "--out", out)
    assert mukv(*begun).returncode == 0
    assert mukv("train", out).returncode == 0
    told(mukv("train", out, "data.task={kind: copying}"), "data.task")
    path = out / "provenance.json"
    record = json.loads(path.read_text()) | {"data_fingerprint": "0" * 64}
    path.write_text(json.dumps(record))
    told(mukv("train", out), "data.task", "mqar", "data of fingerprint 000000000000")
