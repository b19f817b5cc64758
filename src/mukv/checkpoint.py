"""Checkpoints of a training state: whole or not there, checked when read, on any mesh.

Orbax writes every array in pieces from the devices that hold them, commits by one rename, and
reads them back onto another mesh. It does not notice flipped bits (tried: it returns other numbers
without a word), nor say in one line what does not fit. So each step also carries a manifest: name,
shape, type and checksum of every leaf, computed on the devices before saving and after restoring.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from mukv.core.errors import BadInput, Failed
from mukv.core.params import named
from mukv.core.typing import Array, Int

STATE, MANIFEST = "state", "manifest"


@dataclass(frozen=True)
class Keep:
    """Which steps stay: the last ones, and those with the lowest metric."""

    folder: Path
    last: int
    best: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Orbax asks this when a new step is complete, and deletes the others."""
        steps = [checkpoint.step_number for checkpoint in checkpoints]
        scores = metrics(self.folder, steps)
        kept = {*sorted(steps)[-self.last :], *sorted(scores, key=scores.__getitem__)[: self.best]}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one run, in folder/STEP. A context manager; all processes use it alike.

    keep_last: newest steps to keep, at least 1. keep_best: steps with the lowest metric to keep
    besides. asynchronous: `save` returns once the state is copied to the host. read_only: create,
    delete and clean nothing, so that a run in progress may be looked at.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        keep_best: int = 1,
        asynchronous: bool = True,
        read_only: bool = False,
    ):
        """Raises BadInput if the folder can't be used, or holds something else."""
        self.folder = Path(folder).absolute()
        foreign = [step for step in _numbered(self.folder) if not _ours(self.folder / str(step))]
        if foreign:
            raise BadInput(
                str(self.folder / str(foreign[0])), "no checkpoint of mukv", "choose another folder"
            )
        self.saving: int | None = None
        options = ocp.CheckpointManagerOptions(
            preservation_policy=Keep(self.folder, keep_last, keep_best),
            enable_async_checkpointing=asynchronous,
            create=not read_only,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
        )
        try:
            if not read_only:
                self.folder.mkdir(parents=True, exist_ok=True)
            self.manager = ocp.CheckpointManager(self.folder, options=options)
        except OSError as error:
            reason = error.strerror or _first_line(error)
            raise BadInput(str(self.folder), reason, "a folder that can be written") from error

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # A save that fails now must not hide why the block was left.
        with contextlib.suppress(Failed) if kind else contextlib.nullcontext():
            self.close()

    def steps(self) -> list[int]:
        """The complete checkpoints, oldest first."""
        return [step for step in _numbered(self.folder) if _ours(self.folder / str(step))]

    def latest(self) -> int | None:
        """The newest complete step."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The step with the lowest metric, the earlier one of equals."""
        scores = metrics(self.folder, self.steps())
        return min(scores, key=scores.__getitem__, default=None)

    def save(self, step: int, state: Any, metric: float | None = None) -> None:
        """Save a pytree of jax arrays; does nothing if the step is there already.

        metric: lower is better. The state may be donated as soon as this returns. Raises Failed
        if this save, or an asynchronous one before it, can't be written; what was there stays.
        """
        if step == self.saving or step in self.steps():
            return
        self.wait()
        leaves = named(state)
        manifest = {
            "metric": float(metric) if metric is not None and math.isfinite(metric) else None,
            "leaves": {name: _signature(leaf) for name, leaf in leaves.items()},
            "checksums": _checksums(leaves),
        }
        self.saving = step
        arguments = {
            STATE: ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
            MANIFEST: ocp.args.JsonSave(manifest),  # pyright: ignore[reportCallIssue]
        }
        with self._telling_failure():
            # Forced, since Orbax otherwise skips, without a word, a step older than the latest.
            self.manager.save(step, args=ocp.args.Composite(**arguments), force=True)

    def wait(self) -> None:
        """Until everything is on disk. Raises Failed if it can't be written."""
        with self._telling_failure():
            self.manager.wait_until_finished()
        self.saving = None

    def close(self) -> None:
        """Wait, then let go of the folder."""
        try:
            self.wait()
        finally:
            self.manager.close()

    def restore(self, step: int | None, like: Any) -> Any:
        """The state of a step, None for the latest.

        like: pytree of `jax.ShapeDtypeStruct`, each with the sharding that it is wanted in (None:
        the first device). Raises BadInput if there is no such checkpoint or it is another
        model's, Failed if it is damaged.
        """
        self.wait()
        steps = self.steps()
        step = self.latest() if step is None else step
        if step not in steps:
            given = "no checkpoint" if step is None else f"step {step}"
            there = f"saved steps: {', '.join(map(str, steps))}" if steps else "nothing is saved"
            raise BadInput(str(self.folder), given, there)
        try:
            return self._read(step, like)
        except Damaged as error:
            path = self.folder / str(step)
            good = self._newest_good(steps[: steps.index(step)], like)
            advice = "no earlier one is whole" if good is None else f"the last good one is {good}"
            raise Failed(f"{path}: damaged: {error}; {advice}: delete it to go on") from error

    def _newest_good(self, steps: Sequence[int], like: Any) -> int | None:
        for step in reversed(steps):
            with contextlib.suppress(Damaged, BadInput):
                self._read(step, like)
                return step
        return None

    def _read(self, step: int, like: Any) -> Any:
        """Raises Damaged, or BadInput if it is another model's."""
        path = self.folder / str(step)
        try:
            manifest = json.loads((path / MANIFEST / "metadata").read_bytes())
            saved, checksums = dict(manifest["leaves"]), dict(manifest["checksums"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"its manifest can't be read ({_first_line(error)})") from error
        _require_same({name: _signature(leaf) for name, leaf in named(like).items()}, saved, path)
        placed = jax.tree.map(_placed, like)
        wanted = ocp.args.StandardRestore(placed)  # pyright: ignore[reportCallIssue]
        try:
            state = self.manager.restore(step, args=ocp.args.Composite(**{STATE: wanted}))[STATE]
        except Exception as error:  # Orbax and TensorStore raise a dozen types
            raise Damaged(f"it can't be read ({_first_line(error)})") from error
        for name, checksum in _checksums(named(state)).items():
            if checksum != checksums.get(name):
                raise Damaged(f"{name} is not what was saved")
        return state

    @contextlib.contextmanager
    def _telling_failure(self) -> Any:
        try:
            yield
        except Exception as error:  # Orbax and TensorStore raise a dozen types
            step, self.saving = self.saving, None
            text = str(error)
            full = any(sign in text for sign in ("No space left", "os_error_code='28'"))
            reason = "the disk is full" if full else _first_line(error)
            good = self.latest()
            advice = "nothing is saved" if good is None else f"step {good} is safe"
            raise Failed(f"{self.folder}: step {step} was not saved: {reason}; {advice}") from error


class Damaged(Exception):
    """A checkpoint that is not what was saved: the message says where."""


def metrics(folder: Path, steps: Sequence[int]) -> dict[int, float]:
    """The metric of each step that has one; a manifest that can't be read has none."""
    found: dict[int, float] = {}
    for step in steps:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            metric = json.loads((folder / str(step) / MANIFEST / "metadata").read_bytes())["metric"]
            found |= {} if metric is None else {step: float(metric)}
    return found


def _numbered(folder: Path) -> list[int]:
    """Steps by the names of sub-folders; Orbax names unfinished ones otherwise."""
    if not folder.is_dir():
        return []
    names = (entry.name for entry in folder.iterdir() if entry.is_dir())
    return sorted(int(name) for name in names if name.isdecimal() and name.isascii())


def _ours(path: Path) -> bool:
    return (path / STATE).is_dir() or (path / MANIFEST).is_dir()


def _require_same(wanted: dict[str, str], saved: dict[str, str], path: Path) -> None:
    for name in [*wanted, *saved]:
        want, have = wanted.get(name, "nothing of this name"), saved.get(name, "nothing")
        if name not in wanted or want != have:
            allowed = f"the model wants {want}: it is another model's checkpoint"
            raise BadInput(f"{path}: {name}", have, allowed)


def _placed(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _signature(leaf: Any) -> str:
    return f"{leaf.dtype}[{', '.join(map(str, leaf.shape))}]"


def _checksums(leaves: dict[str, Any]) -> dict[str, int]:
    sums = {name: _checksum(leaf) for name, leaf in leaves.items()}
    return {name: int(np.asarray(number)) for name, number in sums.items()}


@jax.jit
def _checksum(array: Array) -> Int[Array, ""]:
    """Sum modulo 2**32 of all bits, each element times an odd number of its own: whatever the
    sharding, any single flipped bit changes it, and so do elements that change places."""
    if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        array = jnp.stack([array.real, array.imag])
    if array.dtype.itemsize == 8:
        bits = jax.lax.bitcast_convert_type(array, jnp.uint32)
    elif jnp.issubdtype(array.dtype, jnp.floating):
        unsigned = jnp.dtype(f"uint{8 * array.dtype.itemsize}")
        bits = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    else:
        bits = array.astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32)
    for axis, size in enumerate(bits.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
