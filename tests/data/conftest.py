"""Fixtures with small token files."""

from __future__ import annotations

from pathlib import Path

import pytest

from mukv.data.build import build_tokens
from mukv.data.tokens import TokenFile


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of sixty documents of different lengths, some not ASCII."""
    path = tmp_path_factory.mktemp("texts")
    for number in range(60):
        (path / f"{number:02}.txt").write_text(f"dócument {number}\n" * (1 + number * 7 % 13))
    return path


@pytest.fixture(scope="session")
def corpus(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenFile:
    return build_tokens([str(folder)], tmp_path_factory.mktemp("tokens") / "t", validation=0.2)
