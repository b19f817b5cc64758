"""Train in a run directory: begin, continue or extend a run, and write its files."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import multihost_utils

from mukv.core.errors import BadInput
from mukv.data.feed import Feed, Origin
from mukv.hub import checkpoint
from mukv.runs import provenance
from mukv.runs.config import Run
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import open_feed
from mukv.runs.start import (
    FIELD,
    checksums,
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
    """Train in `folder`, or continue the run in it; returns the state and the last losses.

    run: the configuration. A run may be continued with other steps, evaluation, logging or mesh,
    and with its data, or the base of its adapters, at another path; another model, data, seed or
    optimizer is refused. title: of the progress bar. ignore_memory: do not compare the memory of a
    step with what is free.

    Raises BadInput for a folder with another run or that another job writes, and for a step that
    takes more memory than is free; only the last needs a compilation.
    """
    run, feed = open_feed(with_base(run), folder)
    for name, value in leaves(schema.to_mapping(run)).items():
        if isinstance(value, str) and not is_text(value):
            raise BadInput(name, value, "text in UTF-8, which config.yaml can hold")
    _check_same(run, folder, feed)  # before the lock, so that a refused folder stays unchanged
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
    # Wait until every process has checked the folder: what the first process writes next would make
    # a slower one refuse it.
    multihost_utils.sync_global_devices("checked")
    stable = training.schedule.stable_until(training.steps)
    keep = (training.keep_last, training.keep_best, stable)
    with Checkpoints(folder.checkpoints, *keep) as checkpoints:
        # Before config.yaml is written with the new steps, so that a kill in between loses nothing.
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
    """Return the state before the first step: randomly initialised, or with the weights of the run
    or model that train.start names. Raises BadInput if that has no weights or others."""
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
    """Return the step of the checkpoint from which a run is extended to more steps: the last one
    before the final decay of the learning rate, since the longer run decays later. None: the run
    continues from its last checkpoint.

    Raises BadInput if every checkpoint from before the decay was deleted.
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
    """Write the configuration, tokenizer and provenance of a run into its folder."""
    write_atomic(folder.config, schema.to_yaml(run))
    origin.tokenizer.save(folder.tokenizer)
    write_atomic(folder.path / provenance.FILE, to_json(provenance.record(origin), indent=2))
    # The tokenizer and generation files of the model that training starts from are copied too.
    start = run.train.start and checkpoint.companion_folder(run.train.start)
    for given in checkpoint.companions(start) if start else ():
        if not (folder.path / given.name).exists():
            write_atomic(folder.path / given.name, given.read_bytes())


def _check_same(run: Run, folder: RunDirectory, origin: Origin) -> None:
    """Raise BadInput for a folder with a run of other settings or data, or with other files."""
    if not folder.exists:
        if folder.path.exists() and not (folder.path.is_dir() and _untouched(folder)):
            raise BadInput(str(folder.path), "a path in use", "a run directory or a new path")
        return
    if provenance.is_untrained(folder.path):
        allowed = "another folder, with --out: this one is the model that training starts from"
        raise BadInput(str(folder.path), "an imported or converted model", allowed)
    before, now = (leaves(schema.to_mapping(each)) for each in (folder.load_config(), run))
    began_with = provenance.began_with(folder.path, origin)
    if began_with is not None:  # the fingerprint is compared below; the path may differ
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
    """Whether a folder is empty, or has only leftovers of a run killed before its first file."""
    there = [path for path in folder.path.iterdir() if not is_leftover(path)]
    checkpoints = folder.checkpoints
    return there in ([], [checkpoints]) and not (
        checkpoints.exists() and (not checkpoints.is_dir() or any(checkpoints.iterdir()))
    )


def summary(outcome: Outcome, folder: RunDirectory) -> dict[str, Any]:
    """Return the object that `train --json` prints; the field names are public."""
    shown = ("step", "loss", "validation_loss", "validation_bits_per_byte", "tokens_per_second")
    facts = {name: getattr(outcome, name) for name in shown}
    return {"run": str(folder.path), **facts, "finished": outcome.finished}
