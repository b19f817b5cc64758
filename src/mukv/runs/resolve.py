"""What `train CONFIG` means: the configuration, the folder, and the data that a run reads."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mukv.core.errors import BadInput
from mukv.data.build import default_corpus, speed_meter, text_tokens
from mukv.data.feed import Feed, TextFeed
from mukv.data.sources import SOURCES
from mukv.data.tokenizer import AnyTokenizer, NoTokenizer, find_tokenizer, load_tokenizer
from mukv.data.tokens import TokenFile, open_tokens
from mukv.hub import checkpoint, gguf
from mukv.hub.checkpoint import Checkpoint
from mukv.runs import config, provenance
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
    id or imported run to begin from. Without `out` the folder's name follows from the
    configuration, so that the same command continues its own run.
    """
    given = RunDirectory(Path(source))
    if given.exists and not provenance.is_imported(given.path):
        mapping = apply_overrides(Run, read_yaml(given.config), overrides)
        return schema.build(Run, mapping), RunDirectory(out) if out else given
    found = None if given.exists else checkpoint.find(source)
    if given.exists or found is not None:
        run = given.load_config() if found is None else imported_run(found)
        # The folder of a GGUF file is that of its tokenizer.
        start = found.folder if found is not None and not given.path.is_file() else given.path
        run = replace(run, train=replace(run.train, start=str(start.resolve())))
        run = schema.build(Run, apply_overrides(Run, schema.to_mapping(run), overrides))
    else:
        run = config.load(source, overrides)
    if out is None:
        digest = hashlib.sha256(schema.to_yaml(run).encode()).hexdigest()[:8]
        out = Path("runs") / f"{Path(source).stem}-{digest}"
    return run, RunDirectory(out)


def open_corpus(run: Run, own: AnyTokenizer | None = None) -> TokenFile:
    """The token file that a run trains on, checked against its fingerprint and vocabulary.

    own: the model's tokenizer; None means that of `train.start`, or none. With one, text is read
    with it and ids of another are refused. Raises BadInput.
    """
    if run.data.task is not None:
        raise BadInput("data.task", run.data.task.kind, "null: text is needed here")
    own = own or _of_start(run)
    tokens = _tokens(run, own)
    if own is not None:
        allowed = "a token file in the ids of the model's own tokenizer, or a text to read with it"
        _check_ids("data.path", str(tokens.path), tokens.tokenizer, own, allowed)
    return tokens


def open_feed(run: Run, folder: RunDirectory | None = None) -> tuple[Run, Feed]:
    """What a run trains on, and the run with the place where that is.

    folder: of the run; of one that has begun, text is read with its tokenizer, and whether the
        data is what it began with is left to its fingerprint

    Raises BadInput.
    """
    task = run.data.task
    begun = folder is not None and folder.exists and folder.tokenizer.exists()
    if task is None:
        if folder is not None and begun:
            tokens = _tokens(run, load_tokenizer(folder.tokenizer))
        else:
            tokens = open_corpus(run)
        data = replace(run.data, path=str(tokens.path.resolve()))
        return replace(run, data=data), TextFeed(tokens, run.data.packing)
    _check_vocabulary(run, task.vocab_size, "data.task")
    feed = TaskFeed(task)
    own = None if begun else _of_start(run)
    if own is not None:
        allowed = "null: the model's ids are those of its own tokenizer, not of this task's words"
        _check_ids("data.task", task.kind, feed.tokenizer, own, allowed)
    return run, feed


def own_tokenizer(source: str | Path) -> AnyTokenizer:
    """The tokenizer of a run directory, Hugging Face folder, GGUF file or hub id; `NoTokenizer`
    where it has none. Raises BadInput for anything else."""
    folder = RunDirectory(Path(source))
    found = None if folder.exists else checkpoint.find(source)
    if found is not None:
        return found.tokenizer
    if not folder.exists and not folder.weights.exists():
        raise BadInput("train.start", str(source), "a run with weights, or a folder of theirs")
    return find_tokenizer(folder.tokenizer)


def named_tokenizer(name: str) -> str | AnyTokenizer:
    """The tokenizer of a GGUF file or hub id, or else the name, which `build_tokens` takes."""
    place = Path(name)
    if gguf.is_gguf(place) or (checkpoint.is_hub_id(name) and not name.endswith(".json")):
        return own_tokenizer(name)
    return name


def _of_start(run: Run) -> AnyTokenizer | None:
    """The tokenizer of the model that a run begins with, if it begins with one."""
    return None if run.train.start is None else own_tokenizer(run.train.start)


def _tokens(run: Run, own: AnyTokenizer | None) -> TokenFile:
    """The token file of a run, unchanged and with no more ids than the model."""
    tokens = _opened(run.data.path, own)
    tokens.require_unchanged()
    needed = tokens.tokenizer.text_vocab_size
    _check_vocabulary(run, needed, f"the tokenizer of {tokens.path}")
    run.model.check_tokenizer(needed)
    return tokens


def _opened(path: str | None, own: AnyTokenizer | None) -> TokenFile:
    """The token file at a path, or the text there in the ids of the model's own tokenizer."""
    if path is not None and not is_text(path):
        return open_tokens(Path(path))
    if isinstance(own, NoTokenizer):
        raise BadInput("data.path", path, "a token file: this model has no tokenizer to read text")
    if path is None:
        with speed_meter("reading the default text") as report:
            return default_corpus(cache_folder(), own, report)
    if own is None:
        allowed = (
            f"a token file, which `mukv data {path} --out FOLDER` makes; text is read directly "
            "where train.start names a model, with its tokenizer"
        )
        raise BadInput("data.path", path, allowed)
    with speed_meter(f"reading {path}") as report:
        return text_tokens(path, own, cache_folder(), report)


def is_text(path: str) -> bool:
    """Whether a `data.path` is a source of text, and no token file or missing path."""
    place = Path(path)
    if not place.exists():
        return path.partition(":")[0] in SOURCES
    return place.is_file() or not (place / "meta.json").exists()


def _check_ids(
    where: str, given: str, tokenizer: AnyTokenizer, own: AnyTokenizer, allowed: str
) -> None:
    """Raise BadInput for ids of another tokenizer than the model's own."""
    if isinstance(own, NoTokenizer) or tokenizer.fingerprint == own.fingerprint:
        return
    stamps = [each.fingerprint[:12] for each in (tokenizer, own)]
    raise BadInput(where, f"{given} (tokenizer {stamps[0]})", f"{allowed} (tokenizer {stamps[1]})")


def _check_vocabulary(run: Run, needed: int, whose: str) -> None:
    if needed > run.model.vocab_size:
        allowed = f"at least the {needed} of {whose}"
        raise BadInput("model.vocab_size", run.model.vocab_size, allowed)


def imported_run(found: Checkpoint) -> Run:
    """The configuration of a run directory that has this model; windows of its evaluation have
    LENGTH tokens."""
    length = min(LENGTH, found.model.context or LENGTH)
    return Run(model=found.model, train=Training(length=length))
