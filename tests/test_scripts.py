"""Names that benchmarks and reproductions import from the package exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path
    for folder in ("benchmarks", "docs", "reproductions")
    for path in (ROOT / folder).rglob("*.py")
)


def is_there(module: str, name: str) -> bool:
    if hasattr(importlib.import_module(module), name):
        return True
    return importlib.util.find_spec(f"{module}.{name}") is not None


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_script_imports_is_there(path):
    nodes = [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)
    ]
    ours = [node for node in nodes if (node.module or "").split(".")[0] == "mukv"]
    missing = [
        f"{node.module}.{alias.name}"
        for node in ours
        for alias in node.names
        if not is_there(str(node.module), alias.name)
    ]
    assert not missing
