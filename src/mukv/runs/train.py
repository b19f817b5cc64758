"""Train in a run directory: begin, continue or extend a run, and write its files."""

from __future__ import annotations

from collections.abc import Mapping
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
    check_start,
    checksums,
    find_base,
    find_start,
    require_base,
    with_base,
    write_base,
)
from mukv.runs.teacher import FIELD as TEACHER
from mukv.runs.teacher import RunTeacher, find_teacher, same_weights, with_teacher
from mukv.schema import schema
from mukv.schema.numbers import leaves
from mukv.storage.checkpoint import Checkpoints
from mukv.storage.copies import fetched, shown
from mukv.storage.files import is_leftover, write_atomic
from mukv.storage.json_text import is_text, to_json
from mukv.storage.processes import one_job_writes
from mukv.storage.weights import save_weights
from mukv.train import metrics
from mukv.train.footprint import require_least, require_room
from mukv.train.loop import Loop, Outcome
from mukv.train.step import Trainer

FREE = (
    *("steps", "schedule", "compute", "profile", "trackers", "keep_last", "keep_best"),
    *("log_every", "evaluate_every", "validation_batches", "checkpoint_every"),
)
"""Keys of `train` that may change when a run is continued."""


def train_run(
    run: Run, folder: RunDirectory, title: str = "training", ignore_memory: bool = False
) -> Outcome:
    """Train in `folder`, or continue the run in it; return the state and the last losses.

    run: the configuration. A run may be continued with another number of steps, evaluation, logging
        or mesh, and with another path of the same data, teacher or base of adapters; a change of
        model, data, seed or optimizer is refused
    title: title of the progress bar
    ignore_memory: train even if a step needs more device memory than is free

    Raises BadInput for a folder with another run, for a folder that another job writes, and for a
    step that needs more device memory than is free. All checks but the last come before any
    compilation.
    """
    check_named(run, folder)
    teacher = find_teacher(run, folder)
    run, feed = open_feed(with_teacher(with_base(run)), folder)
    for name, value in leaves(schema.to_mapping(run)).items():
        if isinstance(value, str) and not is_text(value):
            raise BadInput(name, value, "text in UTF-8, which config.yaml can hold")
    _check_same(run, folder, feed)  # before the lock, so that a refused folder stays unchanged
    if teacher is not None:
        teacher.check_tokenizer(feed.tokenizer)
    with one_job_writes(folder.path):
        return _train(run, feed, teacher, folder, title, ignore_memory)


def check_named(run: Run, folder: RunDirectory) -> None:
    """Raise BadInput for a teacher or initial weights that are missing or do not fit the model.
    This takes no time, whereas data may take minutes to read. folder: of the run"""
    find_teacher(run, folder)
    check_start(run, begun=folder.exists)


def _train(
    run: Run,
    feed: Feed,
    teacher: RunTeacher | None,
    folder: RunDirectory,
    title: str,
    ignore_memory: bool,
) -> Outcome:
    _check_same(run, folder, feed)
    begin = _prolonged_from(run, folder)
    metrics.require(run.train.trackers)
    mesh = run.mesh.build()
    trainer = Trainer(run.model, run.train, mesh, teacher.network if teacher else None)
    base = _freeze(run, folder, trainer, ignore_memory) if run.train.adapter else None
    if not ignore_memory:
        require_room(trainer)
    first = _first_weights(run, folder, trainer)
    notes = teacher.teach(trainer, run, folder) if teacher else None
    training = run.train
    sizes = [(training.seed, *size) for size in training.sizes]
    # Wait until every process has checked the folder, since process 0 writes files into it next,
    # which the check of a slower process would refuse.
    multihost_utils.sync_global_devices("checked")
    stable = training.schedule.stable_until(training.steps)
    keep = (training.keep_last, training.keep_best, stable)
    with Checkpoints(folder.checkpoints, *keep) as checkpoints:
        # Before config.yaml is written with the new number of steps: if the process is killed in
        # between, the next run deletes the same checkpoints.
        if begin is not None:
            checkpoints.forget_after(begin)
        if jax.process_index() == 0:
            describe_run(run, folder, feed, notes)
            if base is not None and run.train.start is not None:
                write_base(folder, run.train.start, base)
        loop = Loop(
            begin=lambda: trainer.state_of(first.pop()) if first else trainer.initial_state(),
            trainer=trainer,
            batches=[feed.source("train", *size) for size in sizes],
            validation=[feed.source("validation", *size) for size in sizes],
            token_bytes=feed.tokenizer.token_bytes(run.model.vocab_size),
            checkpoints=checkpoints,
            folder=folder.path,
            title=title,
        )
        outcome = loop.run()
    save_weights(folder.weights, outcome.state.weights, {"step": str(outcome.step)})
    return outcome


def _first_weights(run: Run, folder: RunDirectory, trainer: Trainer) -> list[Any]:
    """Read the weights that `train.start` names, before a file of the run is written. Returns them
    in a list, from which they are taken, so that they are not held during training; an empty list
    if the first weights are drawn or if a checkpoint has others.

    Raises BadInput if they are missing, damaged or not finite, or do not fit the model.
    """
    if run.train.start is None or run.train.adapter is not None or _has_checkpoints(folder):
        return []
    return [find_start(run.train.start).weights(run.model.params(), trainer.mesh)]


def _freeze(
    run: Run, folder: RunDirectory, trainer: Trainer, ignore_memory: bool
) -> dict[str, int]:
    """Read the weights that the adapters change, give them to the trainer as frozen weights, and
    return their checksums. Raises BadInput if the adapters in the folder were trained on other
    weights, or if the weights need more device memory than is free."""
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
    """Return the step of the checkpoint from which a run is extended to more steps: the last
    checkpoint before the final decay of the learning rate, since the longer run decays later.

    Returns None if the run continues from its last checkpoint. Raises BadInput if all checkpoints
    from before the decay were deleted.
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


def describe_run(
    run: Run, folder: RunDirectory, origin: Origin, notes: Mapping[str, str] | None = None
) -> None:
    """Write the configuration, tokenizer and provenance of a run into its folder. notes: more of
    its provenance."""
    write_atomic(folder.config, schema.to_yaml(run))
    origin.tokenizer.save(folder.tokenizer)
    facts = provenance.record(origin) | dict(notes or {})
    write_atomic(folder.path / provenance.FILE, to_json(facts, indent=2))
    # The tokenizer and generation files of the model that training starts from are copied too.
    start = run.train.start and checkpoint.companion_folder(fetched(run.train.start))
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
        paths = [name for name in now if name.startswith("data.") and name.endswith(".path")]
        before |= {name: now[name] for name in paths if name in before}
    if run.train.adapter is not None and FIELD in before:  # `require_base` compares checksums
        before[FIELD] = now[FIELD]
    if now.get(TEACHER) is not None and same_weights(before, folder.path):
        before[TEACHER] = now[TEACHER]
    for name in [*now, *before]:
        section, key = name.split(".")[:2]
        old, new = before.get(name), now.get(name)
        free = key in FREE and not (key == "steps" and run.train.budget is not None)
        if old != new and section != "mesh" and (section != "train" or not free):
            raise BadInput(
                name, new, f"the run in {folder.path} has {old!r}; give another folder with --out"
            )

    if began_with not in (None, origin.fingerprint):
        where, given = _named_data(run)
        raise BadInput(
            where,
            given,
            f"the run in {folder.path} began with data of fingerprint {began_with[:12]}, this has "
            f"{origin.fingerprint[:12]}; give another folder with --out",
        )


def _named_data(run: Run) -> tuple[str, str]:
    """Return the key that names the data of a run, and its value."""
    if run.data.task is not None:
        return "data.task", run.data.task.kind
    if run.data.mixture:
        return "data.mixture", ", ".join(part.path for part in run.data.mixture)
    return "data.path", str(run.data.path)


def _untouched(folder: RunDirectory) -> bool:
    """Whether a folder is empty, or has only what a run leaves that was killed before it wrote its
    first file."""
    there = [path for path in folder.path.iterdir() if not is_leftover(path)]
    checkpoints = folder.checkpoints
    return there in ([], [checkpoints]) and not (
        checkpoints.exists() and (not checkpoints.is_dir() or any(checkpoints.iterdir()))
    )


def summary(outcome: Outcome, folder: RunDirectory) -> dict[str, Any]:
    """Return the object that `train --json` prints; the field names are public."""
    names = ("step", "loss", "validation_loss", "validation_bits_per_byte", "tokens_per_second")
    facts = {name: getattr(outcome, name) for name in names}
    return {"run": shown(folder.path), **facts, "finished": outcome.finished}
