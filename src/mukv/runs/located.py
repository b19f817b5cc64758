"""Find the model that a command line names, and read its configuration but not its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mukv.cache import Policy
from mukv.core.errors import BadInput, nearest_name
from mukv.hub import checkpoint
from mukv.hub.checkpoint import Checkpoint
from mukv.model.policy_check import check_policy
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import imported_run
from mukv.storage.copies import fetched
from mukv.storage.objects import address


@dataclass(frozen=True)
class Located:
    """A model whose configuration is read, but not its weights.

    source: path or hub id that the user gave
    run: configuration of the model
    folder: folder with the tokenizer and chat template; for a GGUF file, a folder in mukv's cache
    checkpoint: the pretrained weights; None for a run directory
    """

    source: str | Path
    run: Run
    folder: Path
    checkpoint: Checkpoint | None

    def check_policy(self, policy: Policy) -> None:
        """Raise BadInput, with the reason, for a cache policy that does not fit the model's
        layers."""
        check_policy(self.run.model.policy_stack, policy)


def locate(source: str | Path) -> Located:
    """Find a run directory, a Hugging Face folder, a GGUF file or a model of the hub. Folders may
    have an address, s3:// or gs://.

    Raises BadInput if there is none; the error suggests the run directory of the nearest name.
    """
    folder = RunDirectory(fetched(source))
    if folder.exists:
        return Located(source, folder.load_config(), folder.path, None)
    found = checkpoint.find(source if address(source) is None else folder.path)
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
