"""Find and check the model that a run learns from (`train.teacher`).

A run's provenance.json names the teacher and has a checksum of its weights, which are not saved
with the run.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput
from mukv.data.tokenizer import AnyTokenizer, NoTokenizer, find_tokenizer
from mukv.model import LanguageModel
from mukv.runs import loaded
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.runs.located import Located, locate
from mukv.runs.provenance import noted
from mukv.runs.start import checksums
from mukv.train.step import Trainer

FIELD = "train.teacher"
NAME, CHECKSUM = "teacher", "teacher_checksum"
"""Keys of provenance.json."""


@dataclass(frozen=True)
class RunTeacher:
    """A teacher, before its weights are read.

    source: the value of `train.teacher`
    found: the model that it names
    """

    source: str
    found: Located

    @property
    def network(self) -> LanguageModel:
        return self.found.run.model

    def check_tokenizer(self, tokenizer: AnyTokenizer) -> None:
        """Raise BadInput if the teacher gives other meanings to ids than the data's tokenizer."""
        theirs = _tokenizer(self.found)
        if isinstance(theirs, NoTokenizer) or theirs.fingerprint == tokenizer.fingerprint:
            return
        stamps = theirs.fingerprint[:12], tokenizer.fingerprint[:12]
        allowed = f"a model with the tokenizer of the data ({stamps[1]}); it has {stamps[0]}"
        raise BadInput(FIELD, self.source, allowed)

    def teach(self, trainer: Trainer, run: Run, folder: RunDirectory) -> dict[str, str]:
        """Read the weights into a trainer, and return what provenance.json says of them. Raises
        BadInput if the run in the folder began with other weights.
        """
        try:
            weights = loaded.load(self.found, run.mesh).weights
        except BadInput as error:
            raise _named(error) from None
        stamp = json.dumps(checksums(weights), sort_keys=True).encode()
        checksum = hashlib.sha256(stamp).hexdigest()
        before = noted(folder.path, CHECKSUM)
        if before not in (None, checksum):
            raise BadInput(
                FIELD,
                str(run.train.teacher),
                f"the run in {folder.path} began with a teacher of checksum {before[:12]}, this "
                f"has {checksum[:12]}; give another folder with --out",
            )
        trainer.teach(weights)
        return {NAME: str(run.train.teacher), CHECKSUM: checksum}


def with_teacher(run: Run) -> Run:
    """Return the run with an absolute path of its teacher."""
    teacher = run.train.teacher
    if teacher is None or not Path(teacher).exists():
        return run
    return replace(run, train=replace(run.train, teacher=str(Path(teacher).resolve())))


def find_teacher(run: Run, folder: RunDirectory | None = None) -> RunTeacher | None:
    """Find the model that `train.teacher` names; None if it names none.

    folder: of the run

    Raises BadInput for the run itself, for a path without a model, for a model with another number
    of ids, and for one whose context is shorter than the rows.
    """
    source = run.train.teacher
    if source is None:
        return None
    if folder is not None and Path(source).resolve() == folder.path.resolve():
        raise BadInput(FIELD, source, "another model than the run itself")
    try:
        found = locate(source)
    except BadInput as error:
        raise _named(error) from None
    mine, network = run.model, found.run.model
    if network.vocab_size != mine.vocab_size:
        allowed = f"a model with the {mine.vocab_size:,} ids of model.vocab_size"
        raise BadInput(FIELD, f"{source}, with {network.vocab_size:,} ids", allowed)
    longest = max(length for _, length in run.train.sizes)
    if network.context is not None and longest > network.context:
        allowed = f"at most the {network.context:,} tokens of the teacher's context"
        raise BadInput("train.length", longest, allowed)
    return RunTeacher(source, found)


def _tokenizer(found: Located) -> AnyTokenizer:
    """Return the tokenizer of a model whose weights are not read."""
    if found.checkpoint is not None:
        return found.checkpoint.tokenizer
    return find_tokenizer(found.folder / "tokenizer.json")


def _named(error: BadInput) -> BadInput:
    """Return an error about a model as one about the teacher."""
    where = FIELD if error.where == "MODEL" else f"{FIELD}: {error.where}"
    return BadInput(where, error.given, error.allowed, error.nearest)


def same_weights(before: dict[str, Any], folder: Path) -> bool:
    """Whether a run had a teacher that is recognised by its checksum, so that its path may change.

    before: the run's configuration by dotted name
    """
    return before.get(FIELD) is not None and noted(folder, CHECKSUM) is not None
