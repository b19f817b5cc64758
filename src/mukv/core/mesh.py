"""The device mesh, and the table that assigns named dimensions to its axes.

Axis `data` splits the batch and, for storage, one dimension of every large weight (FSDP); axis
`tensor` splits heads, hidden units and the vocabulary. A dimension whose size is not divisible by
the size of its axis is not split; `mukv describe` shows the sharding of each weight. XLA's
partitioner inserts the communication, so the same program runs on one device, on simulated devices
and on a pod.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
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
    "delta_heads": "tensor",
    "delta_key_heads": "tensor",
    "hidden": "tensor",
    "experts": "data",
    "expert_hidden": "tensor",
    "shared_hidden": "tensor",
    "vocab": "tensor",
    "concept_embed": "data",
    "concept_heads": "tensor",
    "concept_kv_heads": "tensor",
    "concept_groups": "tensor",
    "concept_delta_heads": "tensor",
    "concept_delta_key_heads": "tensor",
    "concept_hidden": "tensor",
    "concept_experts": "data",
    "concept_expert_hidden": "tensor",
    "concept_shared_hidden": "tensor",
}
"""Mesh axis of each named dimension; dimensions that are not listed are never split.

Experts are split over `data` for storage only, and over `tensor` within each expert: every device
computes the experts of its own tokens, so no token is sent to another device.
"""

SIMULATED_LIMIT = 8
"""Number of devices that any CPU may simulate; a CPU with more cores may simulate one per core."""


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
        """Number of devices."""
        return self.data * self.tensor

    def build(self) -> Mesh:
        """Make the mesh from the first `size` devices.

        Raises BadInput if there are fewer devices, or if several processes run and some devices
        would be unused.
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
    """Make JAX simulate `devices` devices on the CPU; must be called before JAX is initialised.

    Does nothing if the user has set the number (XLA_FLAGS or JAX_NUM_CPU_DEVICES), or if it exceeds
    both SIMULATED_LIMIT and the number of cores. `MeshShape.build` then reports missing devices.
    """
    chosen = "host_platform_device_count" in os.environ.get("XLA_FLAGS", "")
    if chosen or "JAX_NUM_CPU_DEVICES" in os.environ:
        return
    if 1 < devices <= max(SIMULATED_LIMIT, os.cpu_count() or 1):
        jax.config.update("jax_num_cpu_devices", devices)


def specification(dims: Mapping[str, int], mesh: Any, exclude: Sequence[str] = ()) -> PartitionSpec:
    """Return the partition of an array with these named dimensions; each mesh axis is used once.

    dims: size by name of dimension. exclude: mesh axes that are not used.
    """
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


def weight_shardings(declared: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Return the sharding of each declared weight, as a tree with the keys of `declared`."""

    def shard(param: Param) -> NamedSharding:
        return NamedSharding(mesh, specification(param.dims, mesh))

    return map_params(shard, declared)


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Return the sharding that copies an array to every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding that splits the first axis, the rows of a batch, over the axis `data`."""
    return NamedSharding(mesh, PartitionSpec("data"))


def share_of_batch(mesh: Mesh) -> dict[str, int]:
    """Return the share of each batch that this process reads, as arguments of `Batches`.

    `hosts` is the number of shares and `host` the index of this one. Processes that split only
    weights among themselves read the same rows. Raises BadInput if one process would read parts of
    several shares.
    """
    places: dict[int, set[int]] = {}
    for (place, _), device in np.ndenumerate(mesh.devices):
        places.setdefault(device.process_index, set()).add(place)
    shares = sorted({tuple(sorted(held)) for held in places.values()})
    if any(len(held) * len(shares) != mesh.shape["data"] for held in shares):
        raise BadInput(
            "mesh.tensor",
            mesh.shape["tensor"],
            f"must divide or be a multiple of {jax.local_device_count()}, the devices of a process",
        )
    mine = tuple(sorted(places[jax.process_index()]))
    return {"host": shares.index(mine), "hosts": len(shares)}


def _partitioned_mesh() -> AbstractMesh | None:
    """Return the current mesh if XLA's partitioner splits arrays over it, otherwise None."""
    mesh = jax.sharding.get_abstract_mesh()
    return None if mesh.empty or mesh.size == 1 or mesh.are_all_axes_manual else mesh


def constrain(array: Array, *names: str | None) -> Array:
    """Constrain the sharding of an activation on the current mesh; does nothing without a mesh.

    names: logical name of each axis, a key of AXES; None for an axis that is not split
    """
    mesh = _partitioned_mesh()
    if mesh is None:
        return array
    dims = {name or f"axis{i}": array.shape[i] for i, name in enumerate(names)}
    # In activations, `data` splits only the batch, never the width of the residual stream. Inside
    # `by_data_shard` the batch is split already.
    apart = mesh.manual_axes if "batch" in dims else ("data", *mesh.manual_axes)
    return jax.lax.with_sharding_constraint(array, specification(dims, mesh, exclude=apart))


def by_data_shard(function: Callable[..., Any], weights: Any, *rows: Array) -> Any:
    """Compute `function(weights, *rows)` separately on each shard of the axis `data`.

    For functions that reorder tokens across rows; XLA's partitioner would reorder them across all
    devices. rows: arrays with rows along the first axis, as the function's results must have.
    """
    mesh = _partitioned_mesh()
    if mesh is None or mesh.shape["data"] == 1 or len(rows[0]) % mesh.shape["data"]:
        return function(weights, *rows)
    split = PartitionSpec("data")

    def own(weights: Any, *rows: Array) -> Any:
        # Each shard computes its own gradient of the weights; they are summed once, at the end.
        return function(jax.lax.pcast(weights, "data", to="varying"), *rows)

    return jax.shard_map(
        own,
        mesh=mesh,
        in_specs=(PartitionSpec(), *(split for _ in rows)),
        out_specs=split,
        axis_names={"data"},
    )(weights, *rows)


def by_shard(
    function: Callable[..., Array], names: Sequence[tuple[str, ...]], out: tuple[str, ...]
) -> Callable[..., Array]:
    """Make a function that runs `function` on each shard, for kernels that XLA can't split.

    names: logical names of the leading axes of each argument, keys of AXES
    out: those of the result
    """
    mesh = _partitioned_mesh()
    if mesh is None:
        return function

    def split(*arrays: Array) -> Array:
        sizes = {
            name: n
            for axes, x in zip(names, arrays, strict=True)
            for name, n in zip(axes, x.shape, strict=False)
        }
        table = [
            specification({name: sizes[name] for name in axes}, mesh) for axes in (*names, out)
        ]
        # Kernels do not say over which axes their results vary.
        shards = jax.shard_map(
            function, mesh=mesh, in_specs=tuple(table[:-1]), out_specs=table[-1], check_vma=False
        )
        return shards(*arrays)

    return split


def gather(weights: Any, declared: Any) -> Any:
    """All-gather the weights that the axis `data` splits (FSDP), right before their use.

    The split over `tensor` is kept. The gradient is constrained to the split of the stored weight,
    so that the partitioner sums it by a reduce-scatter: half the traffic of an all-reduce, and no
    device holds the whole gradient. declared: tree of `Param` with the keys of `weights`.
    """
    mesh = _partitioned_mesh()
    if mesh is None:
        return weights

    def collect(param: Param, array: Any) -> Any:
        if isinstance(array, LowRank):
            return array.mapped(collect, param)
        whole = specification(param.dims, mesh, exclude=("data",))
        return _gathered(array, whole, specification(param.dims, mesh))

    return map_params(collect, declared, weights)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(array: Array, whole: PartitionSpec, stored: PartitionSpec) -> Array:
    """Constrain a weight to the split `whole`, and its gradient to the split `stored`."""
    return jax.lax.with_sharding_constraint(array, whole)


_gathered.defvjp(
    lambda array, whole, stored: (_gathered(array, whole, stored), None),
    lambda whole, stored, _, slope: (jax.lax.with_sharding_constraint(slope, stored),),
)
