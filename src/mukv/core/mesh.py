"""The device mesh and the one table that says how named dimensions lie on it.

Axis `data` splits the batch and, for storage, one dimension of every large weight (FSDP); axis
`tensor` splits heads, hidden units and the vocabulary. A dimension that its axis does not divide
is kept whole; `mukv describe` shows where each weight ends up. The compiler's partitioner does
the rest, so the same program runs on one device, on simulated ones and on a pod.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.low_rank import LowRank
from mukv.core.params import Param, map_params
from mukv.core.typing import Array

AXES: Mapping[str, str] = {
    "batch": "data",
    "embed": "data",
    "heads": "tensor",
    "kv_heads": "tensor",
    "groups": "tensor",
    "hidden": "tensor",
    "experts": "data",
    "expert_hidden": "tensor",
    "shared_hidden": "tensor",
    "vocab": "tensor",
    "concept_embed": "data",
    "concept_heads": "tensor",
    "concept_kv_heads": "tensor",
    "concept_groups": "tensor",
    "concept_hidden": "tensor",
    "concept_experts": "data",
    "concept_expert_hidden": "tensor",
    "concept_shared_hidden": "tensor",
}
"""Logical dimension -> mesh axis. What is not listed is never split. Experts are split over `data`
for storage and `tensor` splits each of them: every device computes its own tokens, none travels."""

SIMULATED_LIMIT = 8


@dataclass(frozen=True)
class MeshShape:
    """Sizes of the mesh axes; on a CPU the devices are simulated when there are too few.

    data: devices that split the batch and, for storage, the weights (FSDP)
    tensor: devices that split heads, hidden units and the vocabulary
    """

    data: int = 1
    tensor: int = 1

    def __post_init__(self) -> None:
        require_counts(self, "data", "tensor", most=1 << 20, unit="device")

    @property
    def size(self) -> int:
        return self.data * self.tensor

    def build(self) -> Mesh:
        """The mesh over the first `size` devices.

        Raises BadInput if there are not enough of them, or if processes would be left out.
        """
        devices = jax.devices()
        if self.size > len(devices) or (jax.process_count() > 1 and self.size != len(devices)):
            raise BadInput(
                "mesh",
                f"data {self.data} x tensor {self.tensor} = {self.size} devices",
                f"there are {len(devices)} {devices[0].platform} devices "
                f"in {jax.process_count()} process(es)",
            )
        return jax.make_mesh(
            (self.data, self.tensor),
            ("data", "tensor"),
            axis_types=(AxisType.Auto, AxisType.Auto),
            devices=devices[: self.size],
        )


def simulate(devices: int) -> None:
    """Let a CPU show `devices` devices; call it before JAX first looks at them.

    The number stays where it was set from outside (XLA_FLAGS or JAX_NUM_CPU_DEVICES), and beyond
    what this machine could usefully simulate: `MeshShape.build` then judges what there is.
    """
    chosen = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    if 1 < devices <= max(SIMULATED_LIMIT, os.cpu_count() or 1):
        jax.config.update("jax_num_cpu_devices", devices)


def specification(dims: Mapping[str, int], mesh: Any, exclude: Sequence[str] = ()) -> PartitionSpec:
    """How an array with these named dimensions lies on the mesh; each axis is used once."""
    used = set(exclude)
    parts: list[str | None] = []
    for name, size in dims.items():
        axis = AXES.get(name)
        if axis in used or axis is None or mesh.shape[axis] == 1 or size % mesh.shape[axis]:
            parts.append(None)
        else:
            used.add(axis)
            parts.append(axis)
    return PartitionSpec(*parts)


def weight_shardings(declared: Any, mesh: Mesh) -> Any:
    """A sharding for each declared weight."""

    def shard(param: Param) -> NamedSharding:
        return NamedSharding(mesh, specification(param.dims, mesh))

    return map_params(shard, declared)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the data axis."""
    return NamedSharding(mesh, PartitionSpec("data"))


def share_of_batch(mesh: Mesh) -> dict[str, int]:
    """Which of how many shares of a batch this process reads, as `Batches` takes them.

    Processes that split only weights between them read the same rows. Raises BadInput where a
    process would hold parts of several shares.
    """
    places: dict[int, set[int]] = {}
    for (place, _), device in np.ndenumerate(mesh.devices):
        places.setdefault(device.process_index, set()).add(place)
    shares = sorted({tuple(sorted(held)) for held in places.values()})
    if any(len(held) * len(shares) != mesh.shape["data"] for held in shares):
        raise BadInput(
            "mesh.tensor",
            mesh.shape["tensor"],
            f"must divide the {jax.local_device_count()} devices of a process, or be a multiple",
        )
    mine = tuple(sorted(places[jax.process_index()]))
    return {"host": shares.index(mine), "hosts": len(shares)}


def _partitioned_mesh() -> AbstractMesh | None:
    """The current mesh, where the compiler's partitioner works on it."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual else mesh


def constrain(array: Array, *names: str | None) -> Array:
    """Tell the partitioner how an activation lies on the current mesh, if there is one."""
    mesh = _partitioned_mesh()
    if mesh is None:
        return array
    dims = {name or f"axis{i}": array.shape[i] for i, name in enumerate(names)}
    # The residual's width is never split: in activations the data axis belongs to the batch.
    if "batch" in dims:
        return jax.lax.with_sharding_constraint(array, specification(dims, mesh))
    return jax.lax.with_sharding_constraint(array, specification(dims, mesh, exclude=("data",)))


def by_data_shard(function: Callable[..., Any], weights: Any, *rows: Array) -> Any:
    """`function(weights, *rows)`, computed for the rows of each data shard by itself.

    For functions that reorder tokens over rows, which the partitioner would do over all devices.
    rows: arrays whose first axis is that of rows, as are those that the function gives.
    """
    mesh = _partitioned_mesh()
    if mesh is None or mesh.shape["data"] == 1 or len(rows[0]) % mesh.shape["data"]:
        return function(weights, *rows)
    split = PartitionSpec("data")
    return jax.shard_map(
        function,
        mesh=mesh,
        in_specs=(PartitionSpec(), *(split for _ in rows)),
        out_specs=split,
        axis_names={"data"},
    )(weights, *rows)


def gather(weights: Any, declared: Any) -> Any:
    """Collect what the data axis stores in pieces, right before use (FSDP); tensor stays split."""
    mesh = _partitioned_mesh()
    if mesh is None:
        return weights

    def collect(param: Param, array: Any) -> Any:
        if isinstance(array, LowRank):
            return array.mapped(collect, param)
        spec = specification(param.dims, mesh, exclude=("data",))
        return jax.lax.with_sharding_constraint(array, spec)

    return map_params(collect, declared, weights)
