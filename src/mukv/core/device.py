"""Peak speed of the devices that JAX runs on."""

from __future__ import annotations

import time
from collections.abc import Mapping

import jax
import jax.numpy as jnp

PEAK_FLOPS: Mapping[str, float] = {
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
}
"""Dense bfloat16 floating-point operations per second, by a part of the device's name (makers' data
sheets).
"""


def peak_flops(devices: int) -> float:
    """Return the peak speed of `devices` devices in floating-point operations per second.

    The value comes from PEAK_FLOPS. On a CPU, whose simulated devices share its cores, it is
    measured with a product of float32 matrices (about 50 ms), so that model FLOPs utilisation means
    the same everywhere. NaN if the device is unknown.
    """
    kind = jax.devices()[0].device_kind
    for name, peak in PEAK_FLOPS.items():
        if name in kind:
            return peak * devices
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
