"""A model before its weights are read: its configuration and its folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mukv.core.errors import BadInput, nearest_name
from mukv.hub import checkpoint
from mukv.hub.checkpoint import Checkpoint
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import imported_run


@dataclass(frozen=True)
class Located:
    """folder: of the tokenizer and the chat template; of a GGUF file, that in the cache.
    checkpoint: None for a run directory."""

    source: str | Path
    run: Run
    folder: Path
    checkpoint: Checkpoint | None


def locate(source: str | Path) -> Located:
    """Find the model that MODEL names. Raises BadInput."""
    folder = RunDirectory(Path(source))
    if folder.exists:
        return Located(source, folder.load_config(), folder.path, None)
    found = checkpoint.find(source)
    if found is not None:
        return Located(source, imported_run(found), found.folder, found)
    parent = folder.path.parent
    siblings = [path.parent.name for path in parent.glob("*/config.yaml")]
    near = nearest_name(folder.path.name, siblings)
    raise BadInput(
        "MODEL",
        str(source),
        "a run directory (with a config.yaml), a Hugging Face folder (with a config.json), a "
        ".gguf file or a hub id",
        str(parent / near) if near else None,
    )
