"""Define the paths of a run directory, and load its configuration.

A run directory has config.yaml (with every key of the configuration), metrics.jsonl, checkpoints/,
tokenizer.json, weights/ and provenance.json; with adapters also base.json. `train_run` makes or
continues a run directory, `mukv.load` reads it as a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mukv.runs.config import Run
from mukv.schema import schema
from mukv.schema.yaml_text import read_yaml
from mukv.storage.locks import RUN


@dataclass(frozen=True)
class RunDirectory:
    """Paths of the files of one run directory; nothing is created."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / RUN

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer.json"

    @property
    def weights(self) -> Path:
        return self.path / "weights"

    @property
    def base(self) -> Path:
        """File with the checksums of the weights that adapters were trained on. Only runs with
        adapters have it."""
        return self.path / "base.json"

    @property
    def generation(self) -> Path:
        """File of the ids that begin and end a text, as Hugging Face writes it. Only imported runs
        have it."""
        return self.path / "generation_config.json"

    @property
    def exists(self) -> bool:
        """Whether the folder has a config.yaml."""
        return self.config.is_file()

    def load_config(self) -> Run:
        """Read config.yaml. Raises BadInput for a missing or damaged file and for unknown keys."""
        return schema.build(Run, read_yaml(self.config))
