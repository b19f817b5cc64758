"""Define the configuration of a training run, and load it from a preset or YAML file.

The configuration has the sections `model`, `data`, `train` and `mesh`; the fields of each dataclass
are the YAML keys. Unknown keys and values of the wrong type are refused before anything is compiled
or allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape
from mukv.data.mixture import MixturePart, require_shares
from mukv.data.tokens import open_tokens
from mukv.model import AnyModel, Decoder
from mukv.model.through import Through
from mukv.schema import schema
from mukv.schema.presets import apply_overrides, resolve_preset
from mukv.tasks import AnyTask
from mukv.train.training import Training


@dataclass(frozen=True)
class Data:
    """The data that a run trains on: a token file or a synthetic task.

    path: a token file. If `train.start` names a model with a tokenizer, a text file, a folder or
        another source of `mukv data` is also possible: it is encoded with that tokenizer. None for
        the source code of Python's standard library, encoded once with that tokenizer, or as bytes
    packing: a token attends only to tokens of its own document ("packed"), or to all earlier tokens
        of its row ("contiguous")
    mixture: several token files, each with a weight, instead of `path`: their shares of the
        training tokens
    task: a synthetic task, instead of a token file
    """

    path: str | None = None
    packing: Literal["packed", "contiguous"] = "packed"
    mixture: tuple[MixturePart, ...] = ()
    task: AnyTask | None = None

    def __post_init__(self) -> None:
        if self.path is not None and "\0" in self.path:
            raise BadInput("path", self.path, "a path, which has no NUL character")
        if self.task is not None and self.path is not None:
            raise BadInput("path", self.path, "null where data.task is given: one of the two")
        if self.mixture:
            for name in ("path", "task"):
                if getattr(self, name) is not None:
                    allowed = "null where data.mixture is given: one of the two"
                    raise BadInput(name, getattr(self, name), allowed)
            require_shares([part.weight for part in self.mixture])


@dataclass(frozen=True)
class Run:
    """The configuration of a training run.

    model: architecture and sizes of the model
    data: token file or task that the model is trained on
    train: hyperparameters, and how often the run logs, evaluates and saves
    mesh: number of devices along each axis of the device mesh
    """

    model: AnyModel = field(default_factory=Decoder)
    data: Data = field(default_factory=Data)
    train: Training = field(default_factory=Training)
    mesh: MeshShape = field(default_factory=MeshShape)

    def __post_init__(self) -> None:
        context = self.model.context
        if context is not None and self.train.length > context:
            raise BadInput("train.length", self.train.length, f"at most model.context ({context})")
        for number, stage in enumerate(self.train.stages):
            if context is not None and stage.length > context:
                where = f"train.stages.{number}.length"
                raise BadInput(where, stage.length, f"at most model.context ({context})")
        task = self.data.task
        if task is not None and self.train.length < task.smallest:
            allowed = f"at least the {task.smallest} tokens of data.task"
            raise BadInput("train.length", self.train.length, allowed)
        if self.train.adapter is not None:
            self.train.adapter.check(self.model, self.train)
        if self.train.through is not None:
            self._check_policy(self.train.through)

    def _check_policy(self, through: Through) -> None:
        """Raise BadInput for a policy that can't be in place while this model is trained."""
        for _, length in self.train.sizes:
            try:
                self.model.check_through(through, length)
            except BadInput as error:
                given = f"{through.policy} with rows of {length} tokens"
                raise BadInput("train.policy", given, error.allowed) from None


def presets_folder() -> Path:
    """Return the folder of the presets: inside the installed package, or beside its source."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parents[1] / "configs"


def presets() -> list[str]:
    """Return the names of all presets, sorted."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


VOCABULARY_MULTIPLE = 8
"""A vocabulary size taken from the data is rounded up to a multiple of this, so that the embedding
can be split over the devices of a mesh."""


def load(source: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Load a configuration from a preset's name or a YAML file, with `a.b=c` overrides.

    A `model.vocab_size` that is set nowhere is taken from `data.path` or `data.task`, rounded up.
    Raises BadInput for unknown names, unknown keys and bad values.
    """
    return schema.build(Run, with_vocabulary(given(source, overrides)))


def given(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the nested mapping of all keys that are set by a preset or YAML file, by the files
    that it extends, and by the overrides. Raises BadInput for unknown names and keys."""
    return apply_overrides(Run, resolve_preset(Run, source, presets_folder()), overrides)


def given_or_empty(source: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Return the same as `given`, or an empty mapping for a run directory or a pretrained model,
    whose configuration leaves no key to its default."""
    with suppress(BadInput):
        return given(source, overrides)
    return {}


def with_vocabulary(mapping: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration's mapping. If `model.vocab_size` is missing, it is set to the
    vocabulary size of `data`, rounded up."""
    model, data = mapping.get("model", {}), mapping.get("data", {})
    if not isinstance(model, dict) or not isinstance(data, dict) or "vocab_size" in model:
        return mapping
    # Errors in `data` are reported later: by the strict build of the whole, or on opening the file.
    needed = None
    with suppress(BadInput, OSError, ValueError):
        part = schema.build(Data, data)
        if part.task is not None:
            needed = part.task.vocab_size
        else:
            paths = [part.path] if part.path is not None else [p.path for p in part.mixture]
            needed = max((open_tokens(Path(path)).vocab_size for path in paths), default=None)
    if needed is None:
        return mapping
    rounded = -(-needed // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    return {**mapping, "model": {**model, "vocab_size": rounded}}
