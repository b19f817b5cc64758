"""The root configuration: what a YAML file or preset says, as objects.

Sections are `model`, `data`, `train` and `mesh`; each object's fields are its keys. Loading is
strict, and complete before anything is compiled or allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape
from mukv.data.tokens import open_tokens
from mukv.model import AnyModel, Decoder
from mukv.schema import schema
from mukv.schema.presets import apply_overrides, resolve_preset
from mukv.tasks import AnyTask
from mukv.train.training import Training


@dataclass(frozen=True)
class Data:
    """path: a token file; where `train.start` names a model with a tokenizer also a text file,
    folder or other source, which is read with that tokenizer. None for the Python library's own
    source, built once: in the ids of that tokenizer, or as bytes. packing: tokens see only their
    own document ("packed"), or all that is in the row ("contiguous"). task: a synthetic task
    instead."""

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
    """Everything that a training run depends on.

    model: architecture and its sizes
    data: what the model is trained on
    train: hyperparameters and cadence of training
    mesh: how devices share the work
    """

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
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def presets() -> list[str]:
    """Names of all presets."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


VOCABULARY_MULTIPLE = 8
"""Vocabularies that follow the data are rounded up to a multiple of this, so that they split over
a mesh."""


def load(source: str | Path, overrides: Sequence[str] = ()) -> Run:
    """A preset's name or a YAML file, with `a.b=c` overrides. Raises BadInput.

    A `model.vocab_size` that none of them gives is that of `data.path` or `data.task`, rounded up.
    """
    return schema.build(Run, with_vocabulary(given(source, overrides)))


def given(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys that a preset or YAML file, what it extends, and the overrides set."""
    return apply_overrides(Run, resolve_preset(Run, source, presets_folder()), overrides)


def given_or_empty(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """As `given`; empty for a run directory or a pretrained model, whose configuration is whole."""
    with suppress(BadInput):
        return given(source, overrides)
    return {}


def with_vocabulary(mapping: dict[str, Any]) -> dict[str, Any]:
    """The mapping, with a `model.vocab_size` that fits its data where it sets none."""
    model, data = mapping.get("model", {}), mapping.get("data", {})
    if not isinstance(model, dict) or not isinstance(data, dict) or "vocab_size" in model:
        return mapping
    # What is wrong in `data` is told where it is opened, or by the strict build of everything.
    needed = None
    with suppress(BadInput, OSError, ValueError):
        part = schema.build(Data, data)
        if part.task is not None:
            needed = part.task.vocab_size
        elif part.path is not None:
            needed = open_tokens(Path(part.path)).vocab_size
    if needed is None:
        return mapping
    rounded = -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return {**mapping, "model": {**model, "vocab_size": rounded}}
