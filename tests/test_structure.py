"""The layout of the package: imports go downwards, files stay short, importing is cheap."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mukv

SOURCE = Path(mukv.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
ROOMS = (
    *("core", "storage", "schema", "show", "position", "scaling", "data", "attention", "tasks"),
    *("cache", "model", "infer", "conversion", "train", "hub", "runs", "tuning", "analysis"),
    *("compress", "bench", "cli", "__main__"),
)
"""Folders in the order of imports: a module imports from its own folder and from earlier ones."""
PLACE = {room: place for place, room in enumerate(ROOMS)}
OPTIONAL = {
    *("torch", "transformers", "huggingface_hub", "jinja2", "lm_eval", "sklearn"),
    *("wandb", "tensorboardX", "pyarrow", "datasets", "s3fs", "gcsfs"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Return the names of our modules that a file imports, anywhere in it. `mukv` is the
    package."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES.keys()
            found |= inner or {str(node.module)}
    return {name for name in found if name.split(".")[0] == "mukv"}


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("name", sorted(NAMES.keys() - {"mukv"}))
def test_imports_go_downwards(name):
    for other in imports(NAMES[name]):
        assert other != "mukv", "the package imports its modules, never the reverse"
        assert PLACE[room(other)] <= PLACE[room(name)], other


def test_every_module_is_in_a_room():
    assert {room(name) for name in NAMES if name != "mukv"} == set(ROOMS)


def type_names(path: Path) -> Iterator[str]:
    """Yield the names of the classes of a file, and those of its type aliases: assigned names in
    CamelCase."""
    tree = ast.parse(path.read_text())
    yield from (node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef))
    for node in tree.body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = (each.id for each in targets if isinstance(each, ast.Name))
            yield from (name for name in names if re.fullmatch("_?[A-Z][A-Za-z0-9]*[a-z]+.*", name))


def test_a_type_name_means_one_thing():
    found = Counter(name for path in FILES for name in type_names(path))
    assert {"Decoder", "Residual"} <= found.keys()
    assert [name for name, count in found.items() if count > 1] == []


def test_no_imports_in_a_circle():
    graph = {name: imports(path) - {"mukv"} for name, path in NAMES.items() if name != "mukv"}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_has_at_most_400_lines(path):
    assert len(path.read_text().splitlines()) <= 400


def loaded(code: str) -> set[str]:
    """Return the packages that are imported after running `code` in a new Python process."""
    script = f"{code}\nimport sys; print(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_wrong_command_line_imports_no_large_package():
    assert not loaded("import mukv.cli") & (OPTIONAL | {"jax", "optax", "orbax", "matplotlib"})


def test_no_module_needs_an_extra():
    names = [name for name in NAMES if not name.endswith("__main__")]
    assert not loaded(f"import {', '.join(names)}") & (OPTIONAL | {"matplotlib"})
