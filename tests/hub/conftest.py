"""A folder of Hugging Face's, made of the minuscule model that was trained here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.conftest import command


@pytest.fixture(scope="session")
def exported(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be written to."""
    out = tmp_path_factory.mktemp("exported") / "folder"
    done = command("export", trained, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy, to be written to."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))
