"""Arrange devices in a mesh, so that the axes that communicate least cross the slowest network.

Devices with one `slice_index` are joined by a fast network: a slice of a TPU pod, or the GPUs that
NVLink joins. Axes are given by name and size, from the one that communicates least to the one that
communicates most.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from mukv.core.errors import BadInput


def arranged(devices: Sequence[Any], sizes: Mapping[str, int]) -> Mesh:
    """Make a mesh of these axes from as many devices.

    Raises BadInput if the devices are in several slices that have different numbers of them.
    """
    names, types = tuple(sizes), (AxisType.Auto,) * len(sizes)
    slices = Counter(getattr(device, "slice_index", 0) for device in devices)
    if len(slices) == 1:
        return jax.make_mesh(tuple(sizes.values()), names, axis_types=types, devices=devices)
    return Mesh(hybrid(devices, sizes), names, axis_types=types)


def hybrid(devices: Sequence[Any], sizes: Mapping[str, int]) -> np.ndarray:
    """Return an array of devices that are in several slices, with an axis for each of `sizes`.

    Raises BadInput if the slices have different numbers of devices.
    """
    slices = Counter(device.slice_index for device in devices)
    number, most = len(slices), max(slices.values())
    if min(slices.values()) != most:
        shown = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        near = fitting(sizes, number * most, exact=True)
        raise BadInput(
            "mesh",
            f"{shown} = {len(devices)} devices",
            f"these devices are {', '.join(map(str, slices.values()))} devices of {number} slices, "
            f"and each slice must have as many; {near} would fit",
        )
    outer = across(sizes, number)
    inner = [size // outer[axis] for axis, size in sizes.items()]
    return mesh_utils.create_hybrid_device_mesh(inner, [*outer.values()], devices)


def across(sizes: Mapping[str, int], slices: int) -> dict[str, int]:
    """Return by how much each axis is divided between slices, the first axes as much as possible.
    The product of the sizes is a multiple of the number of slices."""
    outer = {}
    for axis, size in sizes.items():
        outer[axis] = math.gcd(size, slices)
        slices //= outer[axis]
    return outer


def fitting(sizes: Mapping[str, int], devices: int, exact: bool) -> str:
    """Return the meshes next to `sizes` that fit a number of devices, for an error: those that
    differ in one axis or, if there are none, all devices along the axis `data`.

    exact: whether all devices must be used
    """
    found = {}
    for axis in sizes:
        others = math.prod(sizes.values()) // sizes[axis]
        size = devices // others
        if size and not (exact and devices % others):
            found[axis, size] = abs(math.log(size / sizes[axis]))
    if found:
        nearest = sorted(found, key=found.__getitem__)[:2]
        return " or ".join(f"mesh.{axis}={size}" for axis, size in nearest)
    ones = (axis for axis in sizes if axis != "data" and sizes[axis] > 1)
    return " ".join((f"mesh.data={devices}", *(f"mesh.{axis}=1" for axis in ones)))
