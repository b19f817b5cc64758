"""Checkpoints of a training state: atomic, verified when read, independent of the mesh.

Orbax writes every array in shards from the devices that hold them and commits with one rename. It
does not detect flipped bits (tested: it silently returns other numbers), and its errors for files
that don't match or can't be read have many lines. Therefore each step also has a manifest, with
which the arrays that `storage/stored.py` reads are compared. Arrays without elements can't be
saved.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from mukv.core.errors import BadInput, Failed, telling_disk_errors
from mukv.core.params import named
from mukv.storage import manifest
from mukv.storage.failed_saves import LateWrites, remove_unfinished, unfinished
from mukv.storage.manifest import Damaged, reason
from mukv.storage.stored import read_arrays, require_path

if TYPE_CHECKING:
    import orbax.checkpoint as ocp  # imported where it writes, as it takes a quarter of a second

STATE, MANIFEST, DELETED = "state", "manifest", ".deleted"


@dataclass(frozen=True)
class Preserve:
    """Orbax's policy of which steps to keep.

    last: number of newest steps
    best: number of steps with the lowest score
    scores: metric of each step that has one
    pinned: a step that is always kept; None for none
    """

    last: int
    best: int
    scores: dict[int, float]
    pinned: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Return whether each checkpoint is kept. Orbax calls this when a save begins, and deletes
        the other checkpoints once the save is complete."""
        steps = [checkpoint.step for checkpoint in checkpoints]
        scored = sorted(self.scores.keys() & steps, key=lambda step: (self.scores[step], step))
        kept = {*sorted(steps)[-self.last :], *scored[: self.best], self.pinned}
        return [step in kept for step in steps]


@dataclass(frozen=True)
class _Info:
    """The part of Orbax's checkpoint info that `Preserve` reads."""

    step: int


class Checkpoints:
    """The checkpoints of one run, in folder/STEP, as a context manager. All processes of a run must
    make the same calls.

    folder: folder of the checkpoints
    keep_last: number of newest steps to keep, at least 1
    keep_best: number of steps with the lowest metric to keep in addition
    pinned: a step that is always kept; None for none
    asynchronous: whether `save` returns as soon as the state is copied to the host
    read_only: create, delete and clean nothing, so that a run in progress can be inspected
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        keep_best: int = 1,
        pinned: int | None = None,
        asynchronous: bool = True,
        read_only: bool = False,
    ):
        """Open the folder. Raises BadInput if it can't be used, or has sub-folders with a number as
        name that are not checkpoints."""
        self.folder, self.read_only = Path(folder).absolute(), read_only
        foreign = [step for step in _numbered(self.folder) if _foreign(self.folder / str(step))]
        if foreign:
            raise BadInput(
                str(self.folder / str(foreign[0])), "no checkpoint of mukv", "choose another folder"
            )
        self.saving: int | None = None
        self.late = LateWrites()
        self.scores = self._read_scores()
        self.keep = Preserve(keep_last, keep_best, self.scores, pinned)
        self.manager: ocp.CheckpointManager | None = None
        if read_only:
            return
        require_path(self.folder)
        import orbax.checkpoint as ocp

        options = ocp.CheckpointManagerOptions(
            preservation_policy=self.keep,
            enable_async_checkpointing=asynchronous,
            # Move before deleting: a kill during a deletion in place would leave a part that looks
            # like a checkpoint.
            todelete_subdir=DELETED,
        )
        with telling_disk_errors(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            if jax.process_index() == 0:
                _remove_leftovers(self.folder)
                self._empty_deleted()
            self.manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A failing save must not hide the exception with which the block was left.
        with contextlib.suppress(Failed) if kind else contextlib.nullcontext():
            self.close()
        if kind is None and self._may_write:
            self._forget_others()

    def steps(self) -> list[int]:
        """Return the complete checkpoints, oldest first."""
        names: list[str] | None = None
        while True:
            before, names = names, sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
            found = [step for step in _numbered(self.folder) if _ours(self.folder / str(step))]
            # A training process may replace the only checkpoint while the folder is listed.
            if found or names == before:
                return found

    def latest(self) -> int | None:
        """Return the newest complete step; None if there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Return the step with the lowest metric, and of equal ones the earliest; None if no step
        has a metric."""
        scored = self.scores.keys() & self.steps()
        return min(scored, key=lambda step: (self.scores[step], step), default=None)

    def save(self, step: int, state: Any, metric: float | None = None) -> None:
        """Save a pytree of jax arrays; do nothing if the step is already saved.

        metric: score of the step, lower is better; None for none

        The state may be donated after the call. Raises Failed if this checkpoint, or an earlier one
        that is saved asynchronously, can't be written; complete checkpoints are kept.
        """
        if step == self.saving or step in self.steps():
            return
        assert self.manager is not None, "read only"
        import orbax.checkpoint as ocp

        self.wait()
        self._require_space(state)
        if metric is not None and math.isfinite(metric):
            self.scores[step] = float(metric)
        described = manifest.describe(state, self.scores.get(step))
        self.saving = step
        self.late.ignore()
        arguments = {
            STATE: ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
            MANIFEST: ocp.args.JsonSave(described),  # pyright: ignore[reportCallIssue]
        }
        with self._telling_failure():
            # Forced, because Orbax otherwise silently skips a step older than the latest.
            self.manager.save(step, args=ocp.args.Composite(**arguments), force=True)

    def forget_after(self, step: int) -> None:
        """Delete all checkpoints newer than a step."""
        assert self.manager is not None, "read only"
        for later in reversed(self.steps()):
            if later > step:
                self.manager.delete(later)
                self.scores.pop(later, None)

    def wait(self) -> None:
        """Wait until all checkpoints are on disk. Raises Failed if one can't be written."""
        if self.manager is None:
            return
        with self._telling_failure():
            self.manager.wait_until_finished()
        self.saving = None
        self.late.report()
        self._empty_deleted()

    @property
    def _may_write(self) -> bool:
        return not self.read_only and jax.process_index() == 0

    def _forget_others(self) -> None:
        """Delete checkpoints that are not to be kept. A process that was killed after its last save
        may have left some."""
        infos = [_Info(step) for step in self.steps()]
        kept = self.keep.should_preserve(infos, context=None)
        for info, stays in zip(infos, kept, strict=True):
            if not stays:
                (self.folder / DELETED).mkdir(exist_ok=True)
                os.rename(self.folder / str(info.step), self.folder / DELETED / str(info.step))
        self._empty_deleted()

    def _empty_deleted(self) -> None:
        if self._may_write:
            shutil.rmtree(self.folder / DELETED, ignore_errors=True)

    def close(self) -> None:
        """Wait until all checkpoints are on disk, then close Orbax's manager."""
        try:
            self.wait()
        finally:
            if self.manager is not None:
                self.manager.close()

    def restore(self, step: int | None, like: Any) -> Any:
        """Read the state of a step.

        step: the step; None means the latest
        like: pytree of `jax.ShapeDtypeStruct` with the sharding of each array; a sharding of None
            stands for the first device

        Raises BadInput if there is no such checkpoint or it belongs to another model, and Failed if
        it is damaged.
        """
        self.wait()
        steps = self.steps()
        step = self.latest() if step is None else step
        if step not in steps:
            given = "no checkpoint" if step is None else f"step {step}"
            available = (
                f"saved steps: {', '.join(map(str, steps))}" if steps else "nothing is saved"
            )
            raise BadInput(str(self.folder), given, available)
        try:
            return self._read(step, like)
        except Damaged as error:
            path = self.folder / str(step)
            good = self._newest_good(steps[: steps.index(step)], like)
            if good is None:
                advice = "no earlier one is intact: delete the damaged folder to start again"
            else:
                advice = (
                    f"the last good one is {good}: delete the damaged folder to continue from it"
                )
            raise Failed(f"{path}: {error}; {advice}") from error

    def _newest_good(self, steps: Sequence[int], like: Any) -> int | None:
        for step in reversed(steps):
            with contextlib.suppress(Damaged, BadInput):
                self._read(step, like)
                return step
        return None

    def _read(self, step: int, like: Any) -> Any:
        """Read the state of a step. Raises Damaged, or BadInput if it belongs to another model."""
        path = self.folder / str(step)
        saved = manifest.read(path / MANIFEST / "metadata")
        manifest.require_same_tree(saved, like, path)
        require_path(path)
        arrays, problem = {}, None
        try:
            arrays = read_arrays(path / STATE, named(jax.tree.map(_placed, like)))
        except Exception as error:  # TensorStore raises a dozen types
            problem = error
        # All processes must agree on success: otherwise those that succeeded would wait for the
        # others.
        if not np.all(multihost_utils.process_allgather(np.asarray(problem is None))):
            why = "in another process" if problem is None else reason(problem)
            raise Damaged(f"it can't be read ({why})") from problem
        state = jax.tree.unflatten(jax.tree.structure(like), list(arrays.values()))
        manifest.require_same_numbers(saved, state)
        return state

    def _read_scores(self) -> dict[int, float]:
        scores: dict[int, float] = {}
        for step in self.steps():
            with contextlib.suppress(Damaged):
                metric = manifest.read(self.folder / str(step) / MANIFEST / "metadata")["metric"]
                scores |= {} if metric is None else {step: metric}
        return scores

    def _require_space(self, state: Any) -> None:
        # Checked here because Orbax's threads report a full disk in a hundred lines.
        needed = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise Failed(
                f"{self.folder}: the disk is full: a checkpoint needs {needed / 1e6:,.0f} MB and "
                f"{free / 1e6:,.0f} MB are free; the checkpoints that are there are safe"
            )

    @contextlib.contextmanager
    def _telling_failure(self) -> Any:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise a dozen types
            step, self.saving = self.saving, None
            text = str(error)
            signs = ("No space left", "os_error_code='28'", "File too large", "os_error_code='27'")
            full = any(sign in text for sign in signs)
            problem = "the disk is full" if full else reason(error)
            if self._may_write:
                remove_unfinished(self.folder)
            good = self.latest()
            advice = "nothing is saved" if good is None else f"step {good} is safe"
            raise Failed(
                f"{self.folder}: step {step} was not saved: {problem}; {advice}"
            ) from error


def _numbered(folder: Path) -> list[int]:
    """Return the sub-folders' names that are numbers. Unfinished steps have other names."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii())


def _ours(path: Path) -> bool:
    """Whether a folder is a complete checkpoint of mukv."""
    return (path / STATE).is_dir() or (path / MANIFEST).is_dir()


def _foreign(path: Path) -> bool:
    """Whether a folder is neither a checkpoint nor a partly deleted one."""
    names: set[str] = set()
    with contextlib.suppress(FileNotFoundError):  # deleted meanwhile by a running training
        names = {entry.name for entry in path.iterdir()}
    return bool(names) and not names & {STATE, MANIFEST, "_CHECKPOINT_METADATA"}


def _remove_leftovers(folder: Path) -> None:
    """Delete the steps that killed processes have written or deleted only in part.

    Orbax refuses to save a step whose name a partly deleted step has. It can remove unfinished
    steps in a background thread, but that may not have ended when the manager is closed.
    """
    gone = [folder / str(step) for step in _numbered(folder) if not _ours(folder / str(step))]
    for path in (*unfinished(folder), *gone):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
