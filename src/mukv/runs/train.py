"""One folder joins everything: what training writes and everything after reads.

config.yaml (complete, reloadable), metrics.jsonl, checkpoints/, tokenizer.json, weights/ and
provenance.json. `train` makes or continues one, `load` turns one into a model that speaks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from mukv.cli.launch import cache_folder
from mukv.core.errors import BadInput
from mukv.data.build import default_corpus
from mukv.data.feed import Feed, Origin, TextFeed
from mukv.data.tokens import TokenFile, open_tokens
from mukv.hub import checkpoint
from mukv.runs import config, provenance
from mukv.runs.config import Run
from mukv.schema import schema
from mukv.schema.numbers import leaves
from mukv.schema.presets import apply_overrides
from mukv.schema.yaml_text import read_yaml
from mukv.storage.checkpoint import Checkpoints
from mukv.storage.files import is_leftover, write_atomic
from mukv.storage.json_text import is_text, to_json
from mukv.storage.locks import RUN
from mukv.storage.processes import one_job_writes
from mukv.storage.weights import load_weights, require_finite, require_weights, save_weights
from mukv.tasks.feed import TaskFeed
from mukv.train import metrics
from mukv.train.footprint import require_room
from mukv.train.loop import Loop, Outcome
from mukv.train.step import State, Trainer

FREE = (
    *("steps", "schedule", "compute", "profile", "trackers", "keep_last", "keep_best"),
    *("log_every", "evaluate_every", "validation_batches", "checkpoint_every"),
)
"""Keys of `train` that may change when a run is continued."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths of one run."""

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
    def generation(self) -> Path:
        """Only in a run that was imported: ids that begin and end a text, in their format."""
        return self.path / "generation_config.json"

    @property
    def exists(self) -> bool:
        return self.config.is_file()

    def load_config(self) -> Run:
        return schema.build(Run, read_yaml(self.config))


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
        run = checkpoint.imported_run(found)
        run = replace(run, train=replace(run.train, start=str(found.folder.resolve())))
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


def train(
    run: Run, folder: RunDirectory, title: str = "training", ignore_memory: bool = False
) -> Outcome:
    """Train in `folder`, or continue what is there. Raises BadInput before compiling anything, but
    for a step that takes more memory than is free, unless `ignore_memory`.

    A folder may be continued with other steps, evaluation, logging or mesh; with another model,
    data, seed or optimizer it is another run and is refused. So is one that another job writes.
    The data may lie elsewhere.
    """
    run, feed = open_feed(run)
    for name, value in leaves(schema.to_mapping(run)).items():
        if isinstance(value, str) and not is_text(value):
            raise BadInput(name, value, "text in UTF-8, which config.yaml can hold")
    _check_same(run, folder, feed)  # what is refused is left as it is
    with one_job_writes(folder.path):
        return _train(run, feed, folder, title, ignore_memory)


def _train(run: Run, feed: Feed, folder: RunDirectory, title: str, ignore_memory: bool) -> Outcome:
    _check_same(run, folder, feed)
    begin = _prolonged_from(run, folder)
    metrics.require(run.train.trackers)
    mesh = run.mesh.build()
    trainer = Trainer(run.model, run.train, mesh)
    if not ignore_memory:
        require_room(trainer)
    training = run.train
    common = {"seed": training.seed, "batch": training.batch, "length": training.length}
    # Until all have looked: what the first writes must not be taken for another run.
    multihost_utils.sync_global_devices("checked")
    stable = training.schedule.stable_until(training.steps)
    keep = (training.keep_last, training.keep_best, stable)
    with Checkpoints(folder.checkpoints, *keep) as checkpoints:
        # Before the configuration tells of the new end: a kill in between loses nothing.
        if begin is not None:
            checkpoints.forget_after(begin)
        if jax.process_index() == 0:
            describe_run(run, folder, feed)
        loop = Loop(
            begin=partial(_start, run, trainer),
            trainer=trainer,
            batches=feed.source("train", **common),
            validation=feed.source("validation", **common),
            token_bytes=feed.tokenizer.token_bytes(run.model.vocab_size),
            checkpoints=checkpoints,
            folder=folder.path,
            title=title,
        )
        outcome = loop.run()
    save_weights(folder.weights, outcome.state.weights, {"step": str(outcome.step)})
    return outcome


def _start(run: Run, trainer: Trainer) -> State:
    """The state before the first step: drawn, or with the weights of another run or model."""
    if run.train.start is None:
        return trainer.initial_state()
    folder = RunDirectory(Path(run.train.start))
    found = None if folder.exists else checkpoint.find(folder.path)
    declared = run.model.params()
    if found is not None:
        weights = found.place(trainer.mesh)
    elif folder.weights.exists():
        weights, _ = load_weights(folder.weights)
    else:
        raise BadInput("train.start", run.train.start, "a run with weights, or a folder of theirs")
    require_weights(declared, weights, folder.path)
    require_finite(weights, folder.path)
    return trainer.state_of(weights)


def _prolonged_from(run: Run, folder: RunDirectory) -> int | None:
    """The step from which a run goes on where it is to have more steps than it had: before the
    final decay, which the longer run does not make there. None for where it stopped.

    Raises BadInput if that checkpoint is gone, or the schedule knows its end from the start.
    """
    if not folder.exists:
        return None
    before = folder.load_config().train
    if (before.steps, before.schedule) == (run.train.steps, run.train.schedule):
        return None
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        steps = checkpoints.steps()
    stable = before.schedule.stable_until(before.steps)
    if stable is None or before.schedule != run.train.schedule:
        return None
    until = min(stable, run.train.schedule.stable_until(run.train.steps) or 0)
    if not steps or steps[-1] <= until:
        return None
    good = [step for step in steps if step <= until]
    if not good:
        raise BadInput(
            "train.steps",
            run.train.steps,
            f"{before.steps}: the run in {folder.path} has no checkpoint from before its decay "
            f"(step {until}); its checkpoints: {', '.join(map(str, steps))}",
        )
    return good[-1]


def describe_run(run: Run, folder: RunDirectory, origin: Origin) -> None:
    """Write what a run directory says of a run before its first step."""
    write_atomic(folder.config, schema.to_yaml(run))
    origin.tokenizer.save(folder.tokenizer)
    write_atomic(folder.path / provenance.FILE, to_json(provenance.record(origin), indent=2))
    # What a model that it begins with came with belongs to this one too.
    for given in checkpoint.companions(Path(run.train.start)) if run.train.start else ():
        if not (folder.path / given.name).exists():
            write_atomic(folder.path / given.name, given.read_bytes())


def _check_same(run: Run, folder: RunDirectory, origin: Origin) -> None:
    """Raise BadInput where a folder holds another run: of other settings or other data."""
    if not folder.exists:
        if folder.path.exists() and not (folder.path.is_dir() and _untouched(folder)):
            raise BadInput(str(folder.path), "a path in use", "a run directory or a new path")
        return
    before, now = (leaves(schema.to_mapping(each)) for each in (folder.load_config(), run))
    began_with = provenance.began_with(folder.path, origin)
    if began_with is not None:  # wherever it lies
        before["data.path"] = now["data.path"]
    for name in [*now, *before]:
        section, key = name.split(".")[:2]
        old, new = before.get(name), now.get(name)
        free = key in FREE and not (key == "steps" and run.train.budget is not None)
        if old != new and section != "mesh" and (section != "train" or not free):
            raise BadInput(
                name, new, f"the run in {folder.path} has {old!r}; give another folder with --out"
            )

    if began_with not in (None, origin.fingerprint):
        raise BadInput(
            "data.path" if run.data.task is None else "data.task",
            str(run.data.path if run.data.task is None else run.data.task.kind),
            f"the run in {folder.path} began with data of fingerprint {began_with[:12]}, this has "
            f"{origin.fingerprint[:12]}; give another folder with --out",
        )


def _untouched(folder: RunDirectory) -> bool:
    """Whether a folder has nothing, or what a run leaves that was killed at its beginning."""
    there = [path for path in folder.path.iterdir() if not is_leftover(path)]
    checkpoints = folder.checkpoints
    return there in ([], [checkpoints]) and not (
        checkpoints.exists() and (not checkpoints.is_dir() or any(checkpoints.iterdir()))
    )


def summary(outcome: Outcome, folder: RunDirectory) -> dict[str, Any]:
    """What `train --json` prints; the field names are public."""
    shown = ("step", "loss", "validation_loss", "validation_bits_per_byte", "tokens_per_second")
    facts = {name: getattr(outcome, name) for name in shown}
    return {"run": str(folder.path), **facts, "finished": outcome.finished}
