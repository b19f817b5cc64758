"""What must be settled before JAX starts: the allocator, the compilation cache, the devices.

Imports nothing heavy, so that a wrong command line is answered at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"
"""Huge pages, and no memory handed back between steps: 1.6 to 1.9 times faster training steps on
a CPU (benchmarks/train_step.py measures with it)."""


def cache_folder() -> Path:
    """Where compiled programs and the default corpus are kept: $MUKV_CACHE or the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("MUKV_CACHE") or Path(base) / "mukv")


def restart_with_allocator() -> None:
    """Start this command again with glibc told how to allocate, which it reads only at birth.

    Leaves alone what is not Linux, and a GLIBC_TUNABLES that is already set, if only to nothing.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    os.execv(sys.executable, [sys.executable, "-m", "mukv", *sys.argv[1:]])


def prepare(devices: int = 1, distributed: str | None = None) -> None:
    """Settle JAX before its first use.

    devices: over all processes; simulated where there is only a CPU. distributed: how processes
    find each other, "auto" or "HOST:PORT,PROCESSES,NUMBER"; None for a process alone. Raises
    BadInput if that can't be read.
    """
    import logging

    import jax

    from mukv.core.mesh import simulate

    # Orbax logs a traceback from its thread before the error reaches us as one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)

    compiled = cache_folder() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if distributed is None:
        simulate(devices)
        return
    if distributed == "auto":
        jax.distributed.initialize()
        return
    address, processes, number = parse_distributed(distributed)
    simulate(devices // processes)
    jax.distributed.initialize(address, processes, number)


def speaks() -> bool:
    """Whether this process says what all that share a run have to say."""
    import jax

    return jax.process_index() == 0


def parse_distributed(text: str) -> tuple[str, int, int]:
    """Address of process 0, number of processes, number of this one."""
    from mukv.core.errors import BadInput

    parts = text.split(",")
    if len(parts) != 3 or ":" not in parts[0] or not all(part.isdecimal() for part in parts[1:]):
        raise BadInput(
            "--distributed", text, "auto, or HOST:PORT,PROCESSES,NUMBER such as 10.0.0.1:9000,2,0"
        )
    processes, number = int(parts[1]), int(parts[2])
    if not 0 <= number < processes:
        raise BadInput(
            "--distributed", text, f"NUMBER goes from 0 to PROCESSES - 1 ({processes - 1})"
        )
    return parts[0], processes, number
