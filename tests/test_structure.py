"""The house keeps its order: imports go downwards, files stay short, importing is cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mukv

SOURCE = Path(mukv.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
FLOORS = (
    {"core", "heartbeat"},
    {"figures", "position", "scaling", "terminal"},
    {"data", "page"},
    {"attention", "tasks"},
    {"cache"},
    {"model", "training"},
    {"checkpoint", "decode", "evaluate", "metrics", "progress", "rendezvous", "stopping", "train"},
    {"coordinates", "footprint", "loop"},
    {"config", "launch", "provenance"},
    {"hub"},
    {"describe", "runs"},
    {"loaded", "search"},
    {"bench", "compress", "convert", "notes", "transfer"},
    {"analysis", "demo", "harness", "inputs", "output", "report"},
    {"cli"},
    {"__main__"},
)
"""Rooms from the ground up. One imports from itself and from the floors below."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OPTIONAL = {
    *("torch", "transformers", "huggingface_hub", "jinja2", "lm_eval", "sklearn"),
    *("wandb", "tensorboardX", "pyarrow", "datasets"),
}


def name_of(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


NAMES = {name_of(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Our modules that a file imports, wherever in it. What `mukv` itself shows (its version,
    `load`) belongs to no room."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & NAMES.keys()
            found |= inner or {str(node.module)}
    return {name for name in found if name.startswith("mukv.")}


def room(name: str) -> str:
    return name.split(".")[1]


@pytest.mark.parametrize("name", sorted(NAMES.keys() - {"mukv"}))
def test_imports_go_downwards(name):
    for other in imports(NAMES[name]):
        assert room(other) == room(name) or FLOOR[room(other)] < FLOOR[room(name)], other


def test_no_imports_in_a_circle():
    graph = {name: imports(path) for name, path in NAMES.items() if name != "mukv"}
    assert len(list(TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_over_350_lines_wants_to_be_two(path):
    assert len(path.read_text().splitlines()) <= 350


def loaded(code: str) -> set[str]:
    """The packages that are there after running `code` in a fresh Python."""
    script = f"{code}\nimport sys; print(*(name for name in sys.modules if '.' not in name))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_a_wrong_command_line_waits_for_nothing():
    assert not loaded("import mukv.cli") & (OPTIONAL | {"jax", "optax", "orbax", "matplotlib"})


def test_no_module_needs_an_extra():
    names = [name for name in NAMES if not name.endswith("__main__")]
    assert not loaded(f"import {', '.join(names)}") & (OPTIONAL | {"matplotlib"})
