"""`mukv convert`, and other commands on the run that it makes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import mukv as package
from mukv.core.params import named
from mukv.runs.folder import RunDirectory
from mukv.storage.weights import load_weights

pytestmark = pytest.mark.xdist_group("trained")

IDS = np.arange(40).reshape(2, 20)


@pytest.fixture
def latent(mukv, trained, tmp_path) -> Path:
    """Return the minuscule model with latents of full rank."""
    out = tmp_path / "latent"
    done = mukv("convert", trained, "--to", "mla:16", "--out", out)
    assert done.returncode == 0, done.stderr
    assert f"mukv train {out} data.path=TEXT --out NEW" in done.stderr
    *words, where = done.stdout.splitlines()
    assert [line.split()[0] for line in words] == ["conversion", "parameters", "cache"]
    assert re.search(
        r"^cache +256(\.0)? bytes per token and 0 bytes besides, before 256", words[-1]
    )
    assert where == f"run: {out}"
    return out


def test_a_converted_run_is_a_run(mukv, trained, latent, tmp_path):
    before, after = package.load(trained), package.load(latent)
    np.testing.assert_allclose(after.logits(IDS), before.logits(IDS), atol=1e-4)
    told = json.loads((latent / "provenance.json").read_text())
    assert (told["converted_from"], told["conversion"]) == (str(trained), "mla:16")
    assert 4000 < told["calibration_tokens"] <= 4096  # without padding
    again = RunDirectory(latent).load_config()
    assert again.data == before.run.data
    assert (again.train.start, again.train.steps) == (None, before.run.train.steps)
    assert load_weights(latent / "weights")[1]["step"] == "0"
    (tmp_path / "a.txt").write_text("Some text to be read. " * 20)
    for line in (
        ("eval", latent, "--text", tmp_path / "a.txt"),
        ("generate", latent, "--prompt", "a", "--max-tokens", 4),
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
