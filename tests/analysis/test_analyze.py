"""The command `mukv analyze`: its results, files and errors."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from mukv.analysis.command import names_of


@pytest.mark.product
def test_texts_side_by_side(mukv, trained, tmp_path):
    for name, text in (("prose", "It was so. " * 30), ("code", "x = f(x)\n" * 40)):
        (tmp_path / f"{name}.txt").write_text(text)
    texts = ["--text", tmp_path / "prose.txt", "--text", tmp_path / "code.txt"]
    done = mukv("analyze", trained, *texts, "--samples", 4, "--out", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    for name in ("prose", "code"):
        for layer in facts["texts"][name]:
            needed = list(layer["needed"].values())
            assert needed == sorted(needed)
            assert 1 <= needed[0] <= layer["context"] == 32
            assert 0 < layer["top"]["0.01"] <= layer["top"]["0.2"] <= 1
    rows = list(csv.DictReader((tmp_path / "out" / "sparsity.csv").open()))
    assert {row["text"] for row in rows} == {"prose", "code"}
    page = (tmp_path / "out" / "analysis.html").read_text()
    assert page.count("data:image/png;base64,") == 11
    assert "http" not in page


@pytest.mark.product
def test_bad_input_is_refused_before_anything_runs(mukv, trained, tmp_path):
    np.save(tmp_path / "long.npy", np.full(40, 999))
    for given, message in (
        (["--samples", 0], "at least 1"),
        (["--length", 1], "at least 2 tokens"),
        (["--tokens", tmp_path / "long.npy"], "from 0 to 263"),
        (["--tokens", tmp_path / "long.npy", "--length", 64], "at most 40"),
        (["--text", tmp_path / "none.txt"], "a readable file"),
        (["--tokens", tmp_path / "long.npy", "--text", tmp_path / "none.txt"], "one of the two"),
    ):
        done = mukv("analyze", trained, *given, "--out", tmp_path / "out")
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not (tmp_path / "out").exists()


def test_texts_of_one_file_name_have_different_names():
    paths = [Path("a/x.txt"), Path("b/x.txt"), Path("c/y.txt")]
    assert names_of(paths) == ["a/x.txt", "b/x.txt", "y"]
