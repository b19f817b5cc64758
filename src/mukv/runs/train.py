"""Train in a run directory: begin, continue or prolong a run, and write what it leaves."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import multihost_utils

from mukv.core.errors import BadInput
from mukv.data.feed import Feed, Origin
from mukv.runs import provenance
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import open_feed
from mukv.runs.start import (
    FIELD,
    checksums,
    copy_companions,
    find_base,
    find_start,
    require_base,
    with_base,
    write_base,
)
from mukv.schema import schema
from mukv.schema.numbers import leaves
from mukv.storage.checkpoint import Checkpoints
from mukv.storage.files import is_leftover, write_atomic
from mukv.storage.json_text import is_text, to_json
from mukv.storage.processes import one_job_writes
from mukv.storage.weights import save_weights
from mukv.train import metrics
from mukv.train.footprint import require_least, require_room
from mukv.train.loop import Loop, Outcome
from mukv.train.step import State, Trainer

FREE = (
    *("steps", "schedule", "compute", "profile", "trackers", "keep_last", "keep_best"),
    *("log_every", "evaluate_every", "validation_batches", "checkpoint_every"),
)
"""Keys of `train` that may change when a run is continued."""


def train_run(
    run: Run, folder: RunDirectory, title: str = "training", ignore_memory: bool = False
) -> Outcome:
    """Train in `folder`, or continue what is there. Raises BadInput before compiling anything, but
    for a step that takes more memory than is free, unless `ignore_memory`.

    A folder may be continued with other steps, evaluation, logging or mesh; with another model,
    data, seed or optimizer it is another run and is refused. So is one that another job writes.
    The data may lie elsewhere, and so may the weights that adapters change.
    """
    run, feed = open_feed(with_base(run))
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
    base = _freeze(run, folder, trainer, ignore_memory) if run.train.adapter else None
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
            if base is not None and run.train.start is not None:
                write_base(folder, run.train.start, base)
        loop = Loop(
            begin=lambda: _begin(run, trainer),
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


def _begin(run: Run, trainer: Trainer) -> State:
    """The state before the first step: drawn, or with the weights of another run or model."""
    if run.train.start is None or run.train.adapter is not None:
        return trainer.initial_state()
    start = find_start(run.train.start)
    return trainer.state_of(start.weights(run.model.params(), trainer.mesh))


def _freeze(
    run: Run, folder: RunDirectory, trainer: Trainer, ignore_memory: bool
) -> dict[str, int]:
    """Read the weights that the adapters change, and return their checksums. Raises BadInput where
    a run in the folder has adapters of other weights, or where they take more memory than is free.
    """
    declared, where = run.model.params(), run.train.start
    assert where is not None
    start = find_base(where)
    trainer.frozen = trainer.abstract_weights(start.types(declared))
    if not ignore_memory:
        require_least(trainer)  # before they are read
    trainer.freeze(start.weights(declared, trainer.mesh))
    if folder.base.exists() or _has_checkpoints(folder):
        require_base(folder, trainer.frozen, where)
    return checksums(trainer.frozen)


def _has_checkpoints(folder: RunDirectory) -> bool:
    with Checkpoints(folder.checkpoints, read_only=True) as checkpoints:
        return checkpoints.latest() is not None


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
    if run.train.start is not None:
        copy_companions(run.train.start, folder)


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
    if run.train.adapter is not None and FIELD in before:  # recognised when it is read
        before[FIELD] = now[FIELD]
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
