"""The device mesh, and the table that assigns named dimensions to its axes.

Axis `replica` splits only the batch: every replica has all weights. Axis `data` splits the batch
and, for storage, one dimension of every large weight (FSDP); axis `context` splits the tokens of
each row and, for storage, the same dimension of the weights; axis `tensor` splits heads, hidden
units and the vocabulary. A dimension whose size is not divisible by the size of its axis is not
split; `mukv describe` shows the sharding of each weight. XLA's partitioner inserts the
communication, so the same program runs on one device, on simulated devices and on a pod.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from mukv.core.arrange import arranged, fitting
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.params import Param, map_params

STORED = ("data", "context")
"""Axes that split weights for storage only; the weights are gathered over them before their use."""
ROWS = ("replica", "data")
"""Axes that split the rows of a batch."""
AXES: Mapping[str, str | tuple[str, ...]] = {
    "batch": ROWS,
    "token": "context",
    "stream_token": ("context", "tensor"),
    "embed": STORED,
    "heads": "tensor",
    "kv_heads": "tensor",
    "groups": "tensor",
    "delta_heads": "tensor",
    "state_heads": ("tensor", "context"),
    "delta_key_heads": "tensor",
    "hidden": "tensor",
    "experts": STORED,
    "expert_hidden": "tensor",
    "shared_hidden": "tensor",
    "vocab": "tensor",
    "inputs": STORED,
    "concept_embed": STORED,
    "concept_heads": "tensor",
    "concept_kv_heads": "tensor",
    "concept_groups": "tensor",
    "concept_delta_heads": "tensor",
    "concept_delta_key_heads": "tensor",
    "concept_hidden": "tensor",
    "concept_experts": STORED,
    "concept_expert_hidden": "tensor",
    "concept_shared_hidden": "tensor",
}
"""Mesh axes of each named dimension; dimensions that are not listed are never split. Of several
axes, the first ones whose product divides the size are used.

Experts are split over `data` for storage only, and over `tensor` within each expert: every device
computes the experts of its own tokens, so no token is sent to another device.
"""
ORDER = ("replica", "data", "context", "tensor")
"""Axes from the slowest network to the fastest."""

SIMULATED_LIMIT = 8
"""Number of devices that any CPU may simulate; a CPU with more cores may simulate one per core."""


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes; on a CPU the devices are simulated when there are too few.

    data: devices that split the batch and, for storage, the weights (FSDP)
    tensor: devices that split heads, hidden units and the vocabulary
    replica: copies of all weights, each of which trains on its own rows; the copies lie on either
        side of the slowest network
    context: devices that split the tokens of each row and, for storage, the weights
    """

    data: int = 1
    tensor: int = 1
    replica: int = 1
    context: int = 1

    def __post_init__(self) -> None:
        require_counts(self, *ORDER, most=1 << 20, unit="device")

    @property
    def sizes(self) -> dict[str, int]:
        """Size of each axis, in the order of ORDER."""
        return {axis: getattr(self, axis) for axis in ORDER}

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes.values())

    @property
    def abstract(self) -> AbstractMesh:
        """The mesh without devices."""
        return AbstractMesh(tuple(self.sizes.values()), ORDER)

    def __str__(self) -> str:
        named = ("replica", "data", "tensor", "context")
        shown = (axis for axis in named if axis in ("data", "tensor") or getattr(self, axis) > 1)
        return " x ".join(f"{axis} {getattr(self, axis)}" for axis in shown)

    def build(self) -> Mesh:
        """Make the mesh from the first `size` devices.

        Devices in several slices, which a slower network joins, are arranged so that the outer axes
        cross it: `replica` first.

        Raises BadInput if there are fewer devices, if several processes run and some devices would
        be unused, and if the slices have different numbers of devices.
        """
        devices, processes = jax.devices(), jax.process_count()
        if self.size > len(devices) or (processes > 1 and self.size != len(devices)):
            near = fitting(self.sizes, len(devices), exact=processes > 1)
            raise BadInput(
                "mesh",
                f"{self} = {self.size} devices",
                f"there are {len(devices)} {devices[0].platform} devices in {processes} "
                f"process(es); {near} would fit",
            )
        return arranged(devices[: self.size], self.sizes)


def simulate(devices: int) -> None:
    """Make JAX simulate `devices` devices on the CPU; must be called before JAX is initialised.

    Does nothing if the user has set the number (XLA_FLAGS or JAX_NUM_CPU_DEVICES), or if it exceeds
    both SIMULATED_LIMIT and the number of cores. `MeshShape.build` then reports missing devices.
    """
    chosen = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    if 1 < devices <= max(SIMULATED_LIMIT, os.cpu_count() or 1):
        jax.config.update("jax_num_cpu_devices", devices)


def size_of(mesh: Any, *axes: str) -> int:
    """Return the number of devices along these axes of a mesh; axes that it lacks count as 1."""
    return math.prod(mesh.shape.get(axis, 1) for axis in axes)


def specification(dims: Mapping[str, int], mesh: Any, exclude: Sequence[str] = ()) -> PartitionSpec:
    """Return the partition of an array with these named dimensions; each mesh axis is used once.

    dims: size by name of dimension. exclude: mesh axes that are not used.
    """
    used = set(exclude)
    parts: list[str | tuple[str, ...] | None] = []
    for name, size in dims.items():
        named = AXES.get(name, ())
        given = (named,) if isinstance(named, str) else named
        axes = [axis for axis in given if axis not in used and size_of(mesh, axis) > 1]
        while axes and size % size_of(mesh, *axes):
            axes.pop()
        used.update(axes)
        parts.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    return PartitionSpec(*parts)


def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Return the axes of one entry of a partition."""
    return () if part is None else (part,) if isinstance(part, str) else part


def weight_shardings(declared: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return the sharding of each declared weight, as a tree with the keys of `declared`."""

    def shard(param: Param) -> NamedSharding:
        return NamedSharding(mesh, specification(param.dims, mesh))

    return map_params(shard, declared)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding that copies an array to every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of the arrays of a batch, [batch token ...]."""
    return NamedSharding(mesh, PartitionSpec(ROWS, "context"))


def share_of_batch(mesh: Mesh) -> dict[str, int]:
    """Return the share of each batch that this process reads, as arguments of `Batches`.

    `hosts` is the number of shares and `host` the index of this one. Processes that split only
    weights or the tokens of rows among themselves read the same rows. Raises BadInput if one
    process would read parts of several shares.
    """
    rows = size_of(mesh, *ROWS)
    places: dict[int, set[int]] = {}
    for place, devices in enumerate(mesh.devices.reshape(rows, -1)):
        for device in devices:
            places.setdefault(device.process_index, set()).add(place)
    shares = sorted({tuple(sorted(held)) for held in places.values()})
    if any(len(held) * len(shares) != rows for held in shares):
        context = size_of(mesh, "context")
        raise BadInput(
            "mesh.tensor" if context == 1 else "mesh.context x mesh.tensor",
            context * size_of(mesh, "tensor"),
            f"must divide or be a multiple of {jax.local_device_count()}, the devices of a process",
        )
    mine = tuple(sorted(places[jax.process_index()]))
    return {"host": shares.index(mine), "hosts": len(shares)}
