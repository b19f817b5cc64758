"""What must be settled before JAX starts: the allocator, the compilation cache, the devices.

Imports nothing heavy, so that a wrong command line is answered at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from mukv.core.errors import BadInput, Failed
from mukv.storage.files import cache_folder
from mukv.train import rendezvous

ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"
"""Huge pages, and no memory handed back between steps: 1.6 to 1.9 times faster training steps on
a CPU (benchmarks/train_step.py measures with it)."""


def restart_with_allocator() -> None:
    """Start this command again with glibc told how to allocate, which it reads only at birth.

    Leaves alone what is not Linux, and a GLIBC_TUNABLES that is already set, if only to nothing.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = ALLOCATOR
    os.execv(sys.executable, [sys.executable, "-m", "mukv", *sys.argv[1:]])


def prepare(
    devices: int = 1, distributed: str | None = None, tell: Callable[[str], None] = print
) -> AbstractContextManager[Any]:
    """Settle JAX before its first use.

    devices: over all processes; simulated where there is only a CPU. distributed: how processes
    find each other, "auto" or "HOST:PORT,PROCESSES,NUMBER"; None for a process alone. tell: is
    given a line on whom is waited for. The context that it gives is one to train in: it watches
    the other processes (`rendezvous.Watch`). Raises BadInput if that can't be read or reached,
    Failed if not all processes come.
    """
    import logging

    import jax

    from mukv.core.mesh import simulate

    # Of a save that fails, Orbax logs a traceback before the error reaches us as one line, and
    # asyncio one for each write that fails after it.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)

    compiled = cache_folder() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if distributed is None:
        simulate(devices)
        return nullcontext()
    if distributed == "auto":
        try:
            whom = "the other processes of the cluster that JAX found (Slurm, MPI, TPU, GKE)"
            with rendezvous.telling_wait(whom, tell):
                jax.distributed.initialize(initialization_timeout=round(rendezvous.WAIT_SECONDS))
        except (RuntimeError, ValueError) as error:
            raise BadInput("--distributed", distributed, f"a cluster ({error})") from error
        return nullcontext()
    place = rendezvous.parse(distributed)
    simulate(devices // place.processes)
    watch = rendezvous.meet(place, tell)
    wait = round(rendezvous.WAIT_SECONDS)
    try:
        jax.distributed.initialize(
            place.address, place.processes, place.number, initialization_timeout=wait
        )
    except RuntimeError as error:
        raise Failed(f"--distributed: {place.address}: {error}") from error
    return watch


def speaks() -> bool:
    """Whether this process says what all that share a run have to say."""
    import jax

    return jax.process_index() == 0
