"""A fixture with a Hugging Face folder of the minuscule model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def folder(exported: Path, tmp_path: Path) -> Path:
    """Return a copy of the exported folder that tests may write to."""
    return Path(shutil.copytree(exported, tmp_path / "folder"))
