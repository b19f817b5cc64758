"""A folder of Hugging Face's, made of the minuscule model that was trained here."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """A copy that tests may write to."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))
