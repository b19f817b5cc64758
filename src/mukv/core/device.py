"""Memory, speed and links of devices, and the peak speed of those that JAX runs on."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mukv.core.compute import Platform
from mukv.core.errors import unknown_name


@dataclass(frozen=True)
class Device:
    """Data sheet of one device.

    kind: part of the name by which JAX calls it
    memory: bytes
    flops: dense bfloat16 operations per second
    bandwidth: bytes per second from and to its memory
    island: number of devices that fast links join
    fast: bytes per second that it receives from others of its island, all links of one ring
    network: the same, its share, from outside of the island
    platform: as JAX calls it
    """

    kind: str
    memory: float
    flops: float
    bandwidth: float
    island: int
    fast: float
    network: float
    platform: Platform = "gpu"

    def link(self, size: int, stride: int) -> float:
        """Return the bytes per second that a device receives in a ring along one mesh axis.

        size: devices along the axis. stride: devices between two neighbours of it, the product of
            the sizes of all later axes

        Devices of one island that are in the same ring share what comes from outside.
        """
        if size * stride <= self.island:
            return self.fast
        return min(self.fast, self.network * max(1, self.island // stride))


GIBIBYTE = 1 << 30
DEVICES: Mapping[str, Device] = {
    # NVIDIA A100, H100, H200 data sheets (SXM; half of NVLink's sum of both directions), DGX A100
    # and DGX H100 (one adapter of 200 and 400 Gb/s per GPU). Memory as the driver reports it.
    "a100": Device("A100", 79.2 * GIBIBYTE, 312e12, 2.039e12, 8, 300e9, 25e9),
    "h100": Device("H100", 79.1 * GIBIBYTE, 989e12, 3.35e12, 8, 450e9, 50e9),
    "h200": Device("H200", 139.8 * GIBIBYTE, 989e12, 4.8e12, 8, 450e9, 50e9),
    # NVIDIA DGX B200 data sheet.
    "b200": Device("B200", 178.0 * GIBIBYTE, 2250e12, 8e12, 8, 900e9, 50e9),
    # Google Cloud, "System architecture" of each version. A ring takes one axis of the torus, two
    # ports; ports are 50, 50, 100 and 100 GB/s in each direction. The network's share per chip.
    "v4": Device("TPU v4", 32 * GIBIBYTE, 275e12, 1.2e12, 4096, 100e9, 6.25e9, "tpu"),
    "v5e": Device("TPU v5 lite", 16 * GIBIBYTE, 197e12, 0.819e12, 256, 100e9, 3.125e9, "tpu"),
    "v5p": Device("TPU v5", 95 * GIBIBYTE, 459e12, 2.765e12, 6144, 200e9, 6.25e9, "tpu"),
    "v6e": Device("TPU v6 lite", 32 * GIBIBYTE, 918e12, 1.6e12, 256, 200e9, 12.5e9, "tpu"),
}
"""Devices by the name that `mukv describe --device` takes. Of two whose `kind` is in a name, the
first is meant."""


def device(name: str) -> Device:
    """Return a device of the table. Raises BadInput for a name that is not in it."""
    if name not in DEVICES:
        raise unknown_name("device", name, DEVICES)
    return DEVICES[name]


def data_sheet() -> Device | None:
    """Return the device of the table that JAX runs on; None if it is not in the table."""
    kind = jax.devices()[0].device_kind
    return next((device for device in DEVICES.values() if device.kind in kind), None)


def peak_flops(devices: int) -> float:
    """Return the peak speed of `devices` devices in floating-point operations per second.

    The value comes from DEVICES. On a CPU, whose simulated devices share its cores, it is
    measured with a product of float32 matrices (about 50 ms), so that model FLOPs utilisation means
    the same everywhere. NaN if the device is unknown.
    """
    sheet = data_sheet()
    if sheet is not None:
        return sheet.flops * devices
    return _measured() if jax.devices()[0].platform == "cpu" else float("nan")


def _measured(size: int = 1024, rounds: int = 5) -> float:
    """Time a product of float32 matrices [size size]; return the operations per second of the
    fastest round.
    """
    product = jax.jit(jnp.matmul)
    a = jnp.ones((size, size), jnp.float32)
    jax.block_until_ready(product(a, a))
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(product(a, a))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
