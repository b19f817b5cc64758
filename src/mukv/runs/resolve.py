"""Find the configuration, run directory and data that `mukv train CONFIG` names."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mukv.core.errors import BadInput
from mukv.data.build import default_corpus, speed_meter, text_tokens
from mukv.data.feed import Feed, TextFeed
from mukv.data.mixture import MixtureFeed
from mukv.data.sources import SOURCES
from mukv.data.tokenizer import AnyTokenizer, NoTokenizer, load_tokenizer
from mukv.data.tokens import TokenFile, open_tokens
from mukv.hub import checkpoint, gguf
from mukv.hub.checkpoint import Checkpoint
from mukv.runs import config, provenance
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.runs.start import find_start
from mukv.schema import schema
from mukv.schema.presets import apply_overrides
from mukv.schema.yaml_text import read_yaml
from mukv.storage.copies import fetched, shown
from mukv.storage.files import cache_folder
from mukv.tasks.feed import TaskFeed
from mukv.train.training import Training

LENGTH = 2048
"""Default length of an imported model's training rows in tokens; less if its context is shorter."""


def resolve(source: str, overrides: Sequence[str], out: Path | None) -> tuple[Run, RunDirectory]:
    """Return the configuration and run directory that `mukv train CONFIG` names.

    source: the argument CONFIG: a preset, a YAML file, a run directory to continue, or a model
        whose weights training starts from (an imported or converted run directory, a Hugging Face
        folder, a GGUF file or a hub id)
    overrides: texts `a.b=c`
    out: the run directory. None for the run directory to continue, or for a new one whose name has
        a hash of the configuration, so that the same command continues the same run

    Raises BadInput for unknown names, unknown keys and bad values.
    """
    given = RunDirectory(Path(source))
    untrained = given.exists and provenance.is_untrained(given.path)
    if given.exists and not untrained:
        mapping = apply_overrides(Run, read_yaml(given.config), overrides)
        return schema.build(Run, mapping), RunDirectory(out) if out else given
    found = None if untrained else checkpoint.find(source)
    if untrained:
        run = _starting_from(given.load_config(), given.path, overrides)
    elif found is not None:
        # The folder of a GGUF file is that of its tokenizer.
        place = given.path if given.path.is_file() else found.folder
        run = _starting_from(imported_run(found), place, overrides)
    else:
        run = config.load(source, overrides)
    if out is None:
        digest = hashlib.sha256(schema.to_yaml(run).encode()).hexdigest()[:8]
        out = Path("runs") / f"{Path(source).stem}-{digest}"
    return run, RunDirectory(out)


def _starting_from(run: Run, place: Path, overrides: Sequence[str]) -> Run:
    """Return the configuration of a run that starts from the model at a path."""
    run = replace(run, train=replace(run.train, start=shown(place.resolve())))
    return schema.build(Run, apply_overrides(Run, schema.to_mapping(run), overrides))


def open_corpus(run: Run, own: AnyTokenizer | None = None) -> TokenFile:
    """Open the token file that a run trains on.

    own: the model's tokenizer, with which text is encoded; None for the tokenizer of `train.start`,
        if there is one

    Raises BadInput for a token file that has changed since it was built, has the ids of another
    tokenizer, or has more ids than the model, and for a run that trains on a task.
    """
    if run.data.task is not None:
        raise BadInput("data.task", run.data.task.kind, "null: text is needed here")
    if run.data.mixture:
        paths = ", ".join(part.path for part in run.data.mixture)
        raise BadInput("data.mixture", paths, "one of them as data.path: a single text is needed")
    own = _starting_tokenizer(run) if own is None else own
    return _own_tokens(run, own, "data.path", run.data.path, checks=True)


def _starting_tokenizer(run: Run) -> AnyTokenizer | None:
    return None if run.train.start is None else find_start(run.train.start).tokenizer


def _own_tokens(
    run: Run, own: AnyTokenizer | None, where: str, path: str | None, checks: bool
) -> TokenFile:
    """Open a token file, or read a text with the model's own tokenizer. Raises BadInput about
    `where`; with `checks`, also for the ids of another tokenizer."""
    try:
        tokens = _tokens(run, own, path)
    except BadInput as error:
        if error.where != "data.path":
            raise
        raise BadInput(where, error.given, error.allowed, error.nearest) from None
    if checks and own is not None:
        allowed = "a token file in the ids of the model's own tokenizer, or a text to read with it"
        _check_ids(where, str(tokens.path), tokens.tokenizer, own, allowed)
    return tokens


def open_feed(run: Run, folder: RunDirectory | None = None) -> tuple[Run, Feed]:
    """Open the data that a run trains on; return the run with absolute paths, `data.path` filled
    in, and the data.

    folder: the run directory. If the run has begun, text is encoded with the tokenizer in it, and
        not with the tokenizer of `train.start`: `train_run` compares the data's fingerprint

    Raises BadInput as `open_corpus` does, and for parts of a mixture that can't be mixed.
    """
    begun = folder is not None and folder.exists and folder.tokenizer.is_file()
    if run.data.task is None:
        own = load_tokenizer(folder.tokenizer) if folder is not None and begun else None
        own = own if begun else _starting_tokenizer(run)
        return _open_text(run, own, checks=not begun)
    feed = TaskFeed(run.data.task)
    _check_vocabulary(run, feed.task.vocab_size, "data.task")
    start = None if begun or run.train.start is None else find_start(run.train.start)
    if start is not None and not start.of_task:
        allowed = "null: the model's ids are those of its own tokenizer, not of this task's words"
        _check_ids("data.task", feed.task.kind, feed.tokenizer, start.tokenizer, allowed)
    return run, feed


def _open_text(run: Run, own: AnyTokenizer | None, checks: bool) -> tuple[Run, Feed]:
    """Open the token file of a run, or those of its mixture."""
    data = run.data
    if not data.mixture:
        tokens = _own_tokens(run, own, "data.path", data.path, checks)
        data = replace(data, path=shown(tokens.path.resolve()))
        return replace(run, data=data), TextFeed(tokens, data.packing)
    files = [
        _own_tokens(run, own, f"data.mixture.{number}.path", part.path, checks)
        for number, part in enumerate(data.mixture)
    ]
    feed = MixtureFeed((*files,), tuple(part.weight for part in data.mixture), data.packing)
    parts = [
        replace(part, path=shown(file.path.resolve()))
        for part, file in zip(data.mixture, files, strict=True)
    ]
    return replace(run, data=replace(data, mixture=(*parts,))), feed


def named_tokenizer(name: str) -> str | AnyTokenizer:
    """Return the tokenizer of a GGUF file or hub id, or else the unchanged name, which
    `build_tokens` accepts. Raises BadInput for a model that can't be opened."""
    if gguf.is_gguf(Path(name)) or (checkpoint.is_hub_id(name) and not name.endswith(".json")):
        return checkpoint.require(name).tokenizer
    return name


def _tokens(run: Run, own: AnyTokenizer | None, path: str | None) -> TokenFile:
    """Open the token file of a run, or encode its text with the model's tokenizer. Raises BadInput
    for a file that has changed or that has more ids than the model."""
    tokens = _opened(path, own)
    tokens.require_unchanged()
    needed = tokens.tokenizer.text_vocab_size
    _check_vocabulary(run, needed, f"the tokenizer of {tokens.path}")
    run.model.check_tokenizer(needed)
    return tokens


def _opened(path: str | None, own: AnyTokenizer | None) -> TokenFile:
    if path is not None and not names_text(path):
        return open_tokens(fetched(path))
    if isinstance(own, NoTokenizer):
        raise BadInput("data.path", path, "a token file: this model has no tokenizer to read text")
    if path is None:
        with speed_meter("reading the default text") as report:
            return default_corpus(cache_folder(), own, report)
    if own is None:
        allowed = (
            f"a token file, which `mukv data {path} --out FOLDER` makes; text is read directly "
            "if train.start names a model, with its tokenizer"
        )
        raise BadInput("data.path", path, allowed)
    with speed_meter(f"reading {path}") as report:
        return text_tokens(path, own, cache_folder(), report)


def names_text(path: str) -> bool:
    """Whether a `data.path` names a source of text, rather than a token file or a missing path."""
    place = Path(path)
    if not place.exists():
        return path.partition(":")[0] in SOURCES
    return place.is_file() or not (place / "meta.json").exists()


def _check_ids(
    where: str, given: str, tokenizer: AnyTokenizer, own: AnyTokenizer, allowed: str
) -> None:
    """Raise BadInput unless two tokenizers have the same ids for the same tokens. A model without a
    tokenizer takes any ids."""
    if isinstance(own, NoTokenizer) or tokenizer.fingerprint == own.fingerprint:
        return
    stamps = [each.fingerprint[:12] for each in (tokenizer, own)]
    raise BadInput(where, f"{given} (tokenizer {stamps[0]})", f"{allowed} (tokenizer {stamps[1]})")


def _check_vocabulary(run: Run, needed: int, whose: str) -> None:
    if needed > run.model.vocab_size:
        allowed = f"at least the {needed} of {whose}"
        raise BadInput("model.vocab_size", run.model.vocab_size, allowed)


def imported_run(found: Checkpoint) -> Run:
    """Return the configuration of an imported model's run directory, with training rows of LENGTH
    tokens or of its context, whichever is less."""
    length = min(LENGTH, found.model.context or LENGTH)
    return Run(model=found.model, train=Training(length=length))
