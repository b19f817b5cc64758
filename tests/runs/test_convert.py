"""`mukv convert`, and training that goes on from what it makes, with a teacher."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import mukv as package
from mukv.core.params import named
from mukv.data.build import build_tokens
from mukv.runs.folder import RunDirectory
from mukv.storage.weights import load_weights, save_weights

pytestmark = pytest.mark.xdist_group("trained")

IDS = np.arange(40).reshape(2, 20)


@pytest.fixture
def latent(mukv, trained, tmp_path) -> Path:
    """The minuscule model with latents of full rank."""
    out = tmp_path / "latent"
    done = mukv("convert", trained, "--to", "mla:16", "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"train.start={out} train.teacher={trained}" in done.stderr
    return out


def test_a_converted_run_is_a_run(mukv, trained, latent, tmp_path):
    before, after = package.load(trained), package.load(latent)
    np.testing.assert_allclose(after.logits(IDS), before.logits(IDS), atol=1e-4)
    told = json.loads((latent / "provenance.json").read_text())
    assert (told["converted_from"], told["conversion"]) == (str(trained), "mla:16")
    assert told["calibration_tokens"] == 4096
    again = RunDirectory(latent).load_config()
    assert again.data == before.run.data
    assert (again.train.start, again.train.steps) == (None, before.run.train.steps)
    assert load_weights(latent / "weights")[1]["step"] == "0"
    (tmp_path / "a.txt").write_text("Some text to be read. " * 20)
    for line in (
        ("eval", latent, "--text", tmp_path / "a.txt"),
        ("generate", latent, "--prompt", "a", "--max-tokens", 4),
        ("compress", latent, "--text", tmp_path / "a.txt", "--policies", "int8", "--length", 64),
    ):
        done = mukv(*line)
        assert done.returncode == 0, done.stderr


def test_what_it_prints(mukv, trained, tmp_path):
    out, text = tmp_path / "out", tmp_path / "a.txt"
    text.write_text("Some text to be read. " * 20)
    line = ("convert", trained, "--to", "mla:4", "--text", text, "--calibration-tokens", 64)
    done = mukv(*line, "--out", out, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts == {
        "run": str(out),
        "conversion": "mla:4",
        "calibration_tokens": 64,
        "parameters_before": package.load(trained).network and facts["parameters_before"],
        "parameters": sum(leaf.size for leaf in named(package.load(out).weights).values()),
        "cache_bytes_per_token_before": 2 * 2 * 16 * 4,
        "cache_bytes_per_token": 2 * (4 + 16) * 4,
        "cache_bytes_constant_before": 0,
        "cache_bytes_constant": 0,
    }
    assert facts["parameters_before"] == sum(
        leaf.size for leaf in named(package.load(trained).weights).values()
    )


def test_fewer_heads_are_exported_as_the_family_that_they_came_from(mukv, exported, tmp_path):
    run, folder = tmp_path / "run", tmp_path / "folder"
    assert mukv("convert", exported, "--to", "gqa:1", "--out", run).returncode == 0
    assert json.loads((run / "provenance.json").read_text())["architecture"]
    done = mukv("export", run, "--out", folder)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(
        package.load(folder).logits(IDS), package.load(exported).logits(IDS), atol=1e-5
    )
    done = mukv("convert", exported, "--to", "mla:4", "--out", tmp_path / "latent")
    assert done.returncode == 2
    assert "error: --text: got None; a UTF-8 text file" in done.stderr


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("--to", "mla:17"), "error: --to: rank: got 17; possible with rope=1: mla:1 to mla:16"),
        (("--to", "reuse:3"), "error: --to: layers: got 3; "),
        (("--to", "mlb:1"), "did you mean 'mla'?"),
        (("--to", "mla:4", "--text", "nowhere"), "error: --text: got 'nowhere'"),
        (("--to", "mla:4", "--calibration-tokens", 0), "error: --calibration-tokens: got 0"),
        ((), "--to"),
    ],
)
def test_bad_input(mukv, trained, tmp_path, changes, told):
    done = mukv("convert", trained, *changes, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert told in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_path_in_use_is_left_alone(mukv, trained, tmp_path):
    (tmp_path / "a").write_text("")
    done = mukv("convert", trained, "--to", "gqa:1", "--out", tmp_path)
    assert done.returncode == 2
    assert "--out" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


TAUGHT = ("train.steps=3", "train.log_every=1")


def test_training_goes_on_with_the_original_as_teacher(mukv, trained, latent, tmp_path):
    out = tmp_path / "out"
    line = ("train", latent, f"train.start={latent}", f"train.teacher={trained}", *TAUGHT)
    done = mukv(*line, "--out", out, "train.distillation.weight=1")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in (out / "metrics.jsonl").read_text().splitlines()]
    first = lines[0]
    # At full rank the student is the teacher.
    assert abs(first["divergence"]) < 1e-4
    assert first["gradient_norm"] < 1e-2
    assert first["loss"] > 1
    record = json.loads((out / "provenance.json").read_text())
    assert len(record["teacher_checksum"]) == 64
    assert mukv("train", out, "train.steps=4").returncode == 0
    assert json.loads((out / "provenance.json").read_text())["teacher_checksum"]


def test_a_run_goes_on_with_the_teacher_that_it_began_with(mukv, trained, tmp_path):
    teacher, out = tmp_path / "teacher", tmp_path / "out"
    shutil.copytree(trained, teacher)
    line = ("train", trained, f"train.teacher={teacher}", *TAUGHT, "--out", out)
    assert mukv(*line).returncode == 0
    shutil.rmtree(teacher / "checkpoints")
    weights, metadata = load_weights(teacher / "weights")
    weights["embedding"] = weights["embedding"] * np.float32(1.5)
    save_weights(teacher / "weights", weights, metadata)
    done = mukv("train", out, "train.steps=5")
    assert done.returncode == 2
    assert "began with a teacher of checksum" in done.stderr
    done = mukv("train", out, "train.steps=5", f"train.teacher={trained}")
    assert done.returncode == 2
    assert "train.teacher: got" in done.stderr


def test_a_teacher_that_does_not_fit_is_refused(mukv, trained, exported, tmp_path):
    (tmp_path / "a.txt").write_text("A text of letters, which is long enough. " * 60)
    tokens = build_tokens([str(tmp_path / "a.txt")], tmp_path / "tokens", "bpe:260").path
    out = tmp_path / "out"
    for changes, told in (
        (("train.teacher=nowhere",), "train.teacher: got 'nowhere'; a run directory"),
        ((f"train.teacher={trained}", f"data.path={tokens}"), "with the tokenizer of the data"),
        ((f"train.teacher={trained}", "model.vocab_size=272"), "a model with the 272 ids"),
        ((f"train.teacher={exported}", "train.length=100000"), "train.length: got 100000"),
        ((f"train.teacher={trained}", "train.distillation.weight=2"), "weight: got 2"),
    ):
        done = mukv("train", trained, *changes, "--out", out)
        assert done.returncode == 2, told
        assert told in done.stderr
        assert not out.exists()


def test_a_sweep_has_no_teacher(mukv, trained, token_file, tmp_path):
    done = mukv(
        "sweep", "tiny", f"data.path={token_file}", f"train.teacher={trained}", "train.steps=2",
        "train.learning_rate=0.001,0.01", "--out", tmp_path / "sweep",
    )  # fmt: skip
    assert done.returncode == 2
    assert "train.teacher" in done.stderr
