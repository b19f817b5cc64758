"""The root configuration: what a YAML file or preset says, as objects.

Sections are `model`, `data`, `train` and `mesh`; each object's fields are its keys. Loading is
strict, and complete before anything is compiled or allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mukv.core import schema
from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape
from mukv.core.presets import apply_overrides, resolve_preset
from mukv.model import AnyModel, Decoder
from mukv.tasks import AnyTask
from mukv.training import Training


@dataclass(frozen=True)
class Data:
    """path: a token file; None for the Python library's own source, built once. packing: tokens
    see only their own document ("packed"), or all that is in the row ("contiguous"). task: a
    synthetic task instead."""

    path: str | None = None
    packing: Literal["packed", "contiguous"] = "packed"
    task: AnyTask | None = None

    def __post_init__(self) -> None:
        if self.path is not None and "\0" in self.path:
            raise BadInput("path", self.path, "a path, which has no NUL character")
        if self.task is not None and self.path is not None:
            raise BadInput("path", self.path, "null where data.task is given: one of the two")


@dataclass(frozen=True)
class Run:
    """Everything that a training run depends on."""

    model: AnyModel = field(default_factory=Decoder)
    data: Data = field(default_factory=Data)
    train: Training = field(default_factory=Training)
    mesh: MeshShape = field(default_factory=MeshShape)

    def __post_init__(self) -> None:
        context = self.model.context
        if context is not None and self.train.length > context:
            raise BadInput("train.length", self.train.length, f"at most model.context ({context})")
        task = self.data.task
        if task is not None and self.train.length < task.smallest:
            allowed = f"at least the {task.smallest} tokens of data.task"
            raise BadInput("train.length", self.train.length, allowed)


def presets_folder() -> Path:
    """Where the presets are: inside the installed package, or beside its source."""
    package = Path(__file__).parent
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def presets() -> list[str]:
    """Names of all presets."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def load(source: str | Path, overrides: Sequence[str] = ()) -> Run:
    """A preset's name or a YAML file, with `a.b=c` overrides. Raises BadInput."""
    mapping = resolve_preset(Run, source, presets_folder())
    return schema.build(Run, apply_overrides(Run, mapping, overrides))
