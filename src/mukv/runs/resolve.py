"""What `train CONFIG` means: the configuration, the folder, and the data that a run reads."""

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
"""Tokens of a window in which an imported model is evaluated, at most."""


def resolve(source: str, overrides: Sequence[str], out: Path | None) -> tuple[Run, RunDirectory]:
    """The configuration and folder that `train CONFIG` means.

    CONFIG is a preset, a YAML file, a run directory to continue, or a Hugging Face folder or hub
    id to begin from. Without `out` the folder's name follows from the configuration, so that the
    same command continues its own run.
    """
    given = RunDirectory(Path(source))
    if given.exists:
        mapping = apply_overrides(Run, read_yaml(given.config), overrides)
        return schema.build(Run, mapping), RunDirectory(out) if out else given
    found = checkpoint.find(source)
    if found is not None:
        run = imported_run(found)
        # The folder of a GGUF file is in the cache and has only its tokenizer.
        start = given.path if given.path.is_file() else found.folder
        run = replace(run, train=replace(run.train, start=str(start.resolve())))
        run = schema.build(Run, apply_overrides(Run, schema.to_mapping(run), overrides))
    else:
        run = config.load(source, overrides)
    if out is None:
        digest = hashlib.sha256(schema.to_yaml(run).encode()).hexdigest()[:8]
        out = Path("runs") / f"{Path(source).stem}-{digest}"
    return run, RunDirectory(out)


def open_corpus(run: Run) -> TokenFile:
    """The token file that a run trains on, checked against its fingerprint and vocabulary."""
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
    """What a run trains on, and the run with the place where that is."""
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
    """The configuration of a run directory that has this model; windows of its evaluation have
    LENGTH tokens."""
    length = min(LENGTH, found.model.context or LENGTH)
    return Run(model=found.model, train=Training(length=length))
