"""Compute the device memory that a training step takes, and compare it with the free memory.

On a CPU, device memory is the host's RAM. A lower bound from the training state and the residual
stream is computed first, without compilation. The exact number is read from the compiled program,
which the run then uses.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from mukv.core.compute import Platform
from mukv.core.device import DEVICES, Device, peak_flops
from mukv.core.errors import BadInput
from mukv.core.mesh import ROWS, batch_sharding, size_of
from mukv.core.names import gibibytes
from mukv.train.step import BATCH_FIELDS, Trainer

LEFT = 0.95
"""Fraction of the free memory that a step may take; the rest is for Python and the file system."""


def free_memory() -> int:
    """Return the free bytes of the memory of one device. Devices that are simulated on a CPU share
    the host's RAM, whose free bytes are then returned.
    """
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats["bytes_in_use"])
    available = _available()
    # In a container the limit is that of its control group.
    limit, used = (
        _number(Path("/sys/fs/cgroup") / f"memory.{name}") for name in ("max", "current")
    )
    if limit is not None and used is not None:
        # The group's file cache counts as used, but is released when memory is needed.
        available = min(available, limit - used + _cached())
    return max(available, 0)


def this_machine() -> Device:
    """Return one device of this machine: its free memory and peak speed. On a CPU the speed of a
    product of matrices is measured, and the traffic to memory takes no time."""
    found = jax.local_devices()[0]
    known = next((each for each in DEVICES.values() if each.kind in found.device_kind), None)
    if known is not None:
        return replace(known, memory=free_memory())
    speed = peak_flops(1)
    platform = cast(Platform, found.platform)
    return Device(
        found.device_kind, free_memory(), speed, math.inf, 1, math.inf, math.inf, platform
    )


def _available() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 1 << 62  # unknown: nothing is refused


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # no such group, or "max": no limit
        return None


def _cached() -> int:
    try:
        lines = Path("/sys/fs/cgroup/memory.stat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except OSError:
        return 0


def sharing() -> int:
    """Return the number of devices that share one memory: 1, or on a CPU the simulated devices."""
    devices = jax.local_devices()
    return len(devices) if devices[0].platform == "cpu" else 1


def least_bytes(trainer: Trainer) -> int:
    """Return a lower bound of a step's bytes, over all devices that share memory.

    It counts weights, optimizer state, gradient and the input of each layer, which the backward
    pass needs. Frozen weights and a teacher's count only if they are not allocated yet.
    """
    return _here(trainer) * (sum(state_bytes(trainer).values()) - _held(trainer) + _stream(trainer))


def state_bytes(trainer: Trainer) -> dict[str, int]:
    """Return the bytes that one device holds for training, by name: `weights` that are trained,
    `optimizer` state, `gradient`, `frozen` weights of the model under adapters, and weights of the
    `teacher`."""
    state = trainer.abstract_state()
    parts = {
        "weights": state.weights,
        "optimizer": state.optimizer,
        "gradient": state.weights,
        "frozen": trainer.frozen,
        "teacher": trainer.taught,
    }
    return {
        name: sum(_local(leaf) for leaf in jax.tree.leaves(part)) for name, part in parts.items()
    }


def _held(trainer: Trainer) -> int:
    """Return the bytes of weights that are not trained and are allocated on one device."""
    leaves = jax.tree.leaves((trainer.frozen, trainer.taught))
    return sum(_local(leaf) for leaf in leaves if isinstance(leaf, jax.Array))


def _here(trainer: Trainer) -> int:
    return min(sharing(), trainer.mesh.size)


def _local(leaf: Any) -> int:
    """Return the bytes of one device's shard of an array."""
    shape = leaf.sharding.shard_shape(leaf.shape)
    return int(np.prod(shape, dtype=np.float64)) * leaf.dtype.itemsize


def _stream(trainer: Trainer) -> int:
    training, model = trainer.training, trainer.model
    split = size_of(trainer.mesh, *ROWS, "context")
    tokens = training.batch * training.length // training.accumulate // split
    layers = sum(
        len(stack.layers) * stack.d_model / rate.entry
        for stack, rate in zip(model.stacks, model.rates, strict=True)
    )
    return int(tokens * (layers + model.d_model) * trainer.compute.type.itemsize)


def step_bytes(trainer: Trainer) -> int:
    """Compile the step of each stage; return the bytes that the largest takes over all devices that
    share memory.

    State and batch are included, frozen weights and a teacher's only if they are not allocated yet.
    """
    return max(_bytes_of(trainer, shape) for shape in trainer.training.sizes)


def _bytes_of(trainer: Trainer, shape: tuple[int, int]) -> int:
    sharding = batch_sharding(trainer.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(
            shape, jnp.float32 if name == "weight" else jnp.int32, sharding=sharding
        )
        for name in BATCH_FIELDS
    }
    memory = trainer.compile(batch).memory_analysis()
    taken = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    taken += memory.output_size_in_bytes - memory.alias_size_in_bytes
    return _here(trainer) * (taken - _held(trainer))


def require_least(trainer: Trainer) -> int:
    """Return the bytes that a step may take. Raises BadInput if the lower bound exceeds them.
    Nothing is compiled.
    """
    room = int(LEFT * free_memory())
    least = least_bytes(trainer)
    if least > room:
        raise _too_large(trainer, f"at least {gibibytes(least)}", least, room)
    return room


def require_bytes(what: str, taken: int, where: str, given: int) -> None:
    """Raise BadInput if an allocation takes more bytes than are free.

    what: name of the allocation, such as "the cache"
    taken: its bytes
    where, given: name and value of the field that determines its size
    """
    room = int(LEFT * free_memory())
    if taken > room:
        sizes = f"{what} takes {gibibytes(taken)} of memory, and {gibibytes(room)} are free"
        raise BadInput(where, given, f"at most about {int(given * room / taken):,}: {sizes}")


def require_room(trainer: Trainer) -> None:
    """Raise BadInput if a step takes more memory than is free; the message has the bytes, and
    settings that would fit.

    If even the lower bound is too large, nothing is compiled.
    """
    room = require_least(trainer)
    taken = step_bytes(trainer)
    if taken > room:
        raise _too_large(trainer, gibibytes(taken), taken, room)


def _too_large(trainer: Trainer, shown: str, taken: int, room: int) -> BadInput:
    training = trainer.training
    fixed = least_bytes(trainer) - _here(trainer) * _stream(trainer)
    where = f"batch {training.batch:,} x length {training.length:,}"
    message = f"a step takes {shown} of memory, and {gibibytes(room)} are free"
    if fixed >= room:
        message += f"; weights and optimizer alone take {gibibytes(fixed)}: a smaller model"
        return BadInput("memory", where, f"{message} (or `ignore_memory`)")
    share = (room - fixed) / (taken - fixed)
    rows = training.batch // training.accumulate
    split = size_of(trainer.mesh, *ROWS)
    fits = int(rows * share) // split * split
    ways: list[str] = []
    if fits:
        parts = [n for n in range(1, training.batch + 1) if training.batch % n == 0]
        pieces = [
            n for n in parts if training.batch // n <= fits and training.batch // n % split == 0
        ]
        ways += [f"train.accumulate={pieces[0]}"] if pieces else []
        ways += [f"train.batch={fits * training.accumulate}"]
    context = size_of(trainer.mesh, "context")
    length = int(training.length * share) // context * context
    ways += [f"train.length={length}"] if length else []
    return BadInput(
        "memory", where, f"{message}; about what fits: {' or '.join(ways)} (or `ignore_memory`)"
    )
