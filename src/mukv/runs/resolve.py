"""Find the configuration, run directory and data that `mukv train CONFIG` names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mukv.core.errors import BadInput
from mukv.data.build import default_corpus
from mukv.data.feed import Feed, TextFeed
from mukv.data.tokens import TokenFile, open_tokens
from mukv.hub import checkpoint
from mukv.hub.checkpoint import Checkpoint
from mukv.runs import config
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.schema import schema
from mukv.schema.presets import apply_overrides
from mukv.schema.yaml_text import read_yaml
from mukv.storage.files import cache_folder
from mukv.tasks.feed import TaskFeed
from mukv.train.training import Training

LENGTH = 2048
"""Default window of an imported model in tokens; less if its context is shorter."""


def resolve(source: str, overrides: Sequence[str], out: Path | None) -> tuple[Run, RunDirectory]:
    """Return the configuration and run directory that `mukv train CONFIG` names.

    source: CONFIG: a preset, a YAML file, a run directory to continue, or a Hugging Face folder or
        hub id whose weights training starts from
    overrides: `a.b=c`
    out: the run directory; None for the one to continue, or for a name with a hash of the
        configuration, so that the same command continues its own run

    Raises BadInput for unknown names, unknown keys and bad values.
    """
    given = RunDirectory(Path(source))
    if given.exists:
        mapping = apply_overrides(Run, read_yaml(given.config), overrides)
        return schema.build(Run, mapping), RunDirectory(out) if out else given
    found = checkpoint.find(source)
    if found is not None:
        run = imported_run(found)
        run = replace(run, train=replace(run.train, start=str(found.folder.resolve())))
        run = schema.build(Run, apply_overrides(Run, schema.to_mapping(run), overrides))
    else:
        run = config.load(source, overrides)
    if out is None:
        digest = hashlib.sha256(schema.to_yaml(run).encode()).hexdigest()[:8]
        out = Path("runs") / f"{Path(source).stem}-{digest}"
    return run, RunDirectory(out)


def open_corpus(run: Run) -> TokenFile:
    """Open the token file that a run trains on. Raises BadInput if it has changed since it was
    built, if its vocabulary is larger than the model's, or if the run trains on a task."""
    if run.data.task is not None:
        raise BadInput("data.task", run.data.task.kind, "null: text is needed here")
    tokens = (
        default_corpus(cache_folder())
        if run.data.path is None
        else open_tokens(Path(run.data.path))
    )
    tokens.require_unchanged()
    needed = tokens.tokenizer.text_vocab_size
    _check_vocabulary(run, needed, f"the tokenizer of {tokens.path}")
    run.model.check_tokenizer(needed)
    return tokens


def open_feed(run: Run) -> tuple[Run, Feed]:
    """Open the data that a run trains on; returns the run with `data.path` filled in, and the
    data. Raises BadInput as `open_corpus` does."""
    task = run.data.task
    if task is None:
        tokens = open_corpus(run)
        data = replace(run.data, path=str(tokens.path.resolve()))
        return replace(run, data=data), TextFeed(tokens, run.data.packing)
    _check_vocabulary(run, task.vocab_size, "data.task")
    return run, TaskFeed(task)


def _check_vocabulary(run: Run, needed: int, whose: str) -> None:
    if needed > run.model.vocab_size:
        allowed = f"at least the {needed} of {whose}"
        raise BadInput("model.vocab_size", run.model.vocab_size, allowed)


def imported_run(found: Checkpoint) -> Run:
    """Return the configuration of the run directory of an imported model, with windows of LENGTH
    tokens or its context, whichever is less."""
    length = min(LENGTH, found.model.context or LENGTH)
    return Run(model=found.model, train=Training(length=length))
