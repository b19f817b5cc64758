"""A path that the file system allows works in all commands, or is refused before the first step."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

import mukv as package
from mukv.schema.yaml_text import has_comment
from mukv.tuning.study import storage_of
from tests.conftest import MINUSCULE
from tests.pairs import params

pytestmark = pytest.mark.xdist_group("trained")

ODD = "é 日{x}%20{#&'\"$~;:|=+@,!`^()<>\n\x01.orbax-checkpoint-tmp "
"""One name with all special characters that must work."""
REFUSED = ("a[b]", "[", "]", "a\\b", "a*b", "?")
NO_TEXT = os.fsdecode(b"\xff\xfe")


def right(done) -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(done, *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()  # notes may stand before it
    assert [line for line in lines if line.startswith("error: ")] == lines[-1:], done.stderr
    assert [part for part in parts if part not in done.stderr] == []


@pytest.mark.product
def test_commands_take_odd_names(mukv, tmp_path, monkeypatch):
    """Commands take paths with leading dots and dashes, relative and absolute."""
    place = tmp_path / ODD
    place.mkdir()
    monkeypatch.chdir(place)
    (place / "-texts").mkdir()
    for number in range(20):
        (place / "-texts" / f"[{number}].txt").write_text(f"Text number {number}. " * 9)
    right(mukv("data", place / "-texts", "--out", ".tokens"))
    configured = json.dumps(str(place / ".tokens"))  # a value is YAML
    given = ("train", "tiny", *MINUSCULE, f"data.path={configured}", "train.checkpoint_every=2")
    right(mukv(*given, "--out", ".run"))
    right(mukv("train", ".run", "train.steps=4"))
    for name in ("weights", "checkpoints"):
        assert np.isfinite(package.load(place / ".run").logits([256, 65])).all()
        (place / ".run" / name).rename(place / f"no {name}")
        if name == "weights":
            right(mukv("eval", place / ".run", "--text", "-texts/[1].txt"))
            (place / "no weights").rename(place / ".run" / "weights")
    right(mukv("generate", ".run", "--prompt", "a", "--max-tokens", 2))
    right(mukv("export", ".run", "--out=-exported"))
    right(mukv("import", place / "-exported", "--out", "imported"))
    right(mukv("eval", "imported", "--text", "-texts/[1].txt"))
    right(mukv("report", ".run", "--out", "page.html"))
    assert (place / "page.html").stat().st_size > 1000


@pytest.mark.product
@pytest.mark.parametrize("name", params(REFUSED, REFUSED[:1]))
def test_a_path_that_can_not_hold_checkpoints_is_refused_at_once(mukv, token_file, tmp_path, name):
    out = tmp_path / name / "run"
    refused(mukv("train", "tiny", *MINUSCULE, f"data.path={token_file}", "--out", out), "--out")
    refused(mukv("demo", "--fast", "--out", tmp_path / name), "--out", name[0])
    assert not list(tmp_path.rglob("checkpoints"))


@pytest.mark.parametrize(
    "value", ["a#b", "'#x'", "'a #b'", '"#"', "#", " # x", "[1, 2] # x", "a # b"]
)
def test_comments_in_values_are_detected(value):
    """Values with a YAML comment are detected, since it would silently cut a path short."""
    assert has_comment(value) == value.endswith(("#", "# x", "# b"))


def test_paths_that_are_not_utf8_are_refused(mukv, token_file, tmp_path, monkeypatch):
    for args in (("train", NO_TEXT), ("data", "stdlib", "--out", NO_TEXT), ("report", NO_TEXT)):
        refused(mukv(*args), "UTF-8", "\\udcff")
    Path(tmp_path / NO_TEXT).mkdir()
    given = ("train", "tiny", *MINUSCULE)
    monkeypatch.chdir(tmp_path / NO_TEXT)
    refused(mukv(*given, f"data.path={token_file}", "--out", "run"), "--out", "UTF-8")
    Path("tokens").symlink_to(token_file)
    assert os.listdir() == ["tokens"]
    token_copy = tmp_path / NO_TEXT / "copied"
    token_copy.mkdir()
    for path in token_file.iterdir():
        (token_copy / path.name).write_bytes(path.read_bytes())
    refused(mukv(*given, "data.path=copied", "--out", tmp_path / "run"), "data.path", "UTF-8")
    assert not (tmp_path / "run").exists()


def test_the_url_of_a_study_has_its_path(tmp_path):
    """The path of a study is escaped in its URL, where "?" and "%" have a meaning."""
    from sqlalchemy import make_url

    for name in ("a?b", "a%20b", "a#b", "a?mode=memory", "é", "a:b@c"):
        url = storage_of(tmp_path / name)
        assert make_url(url).database == str(tmp_path / name / "study.db")
