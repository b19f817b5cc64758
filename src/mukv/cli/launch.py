"""What must be settled before JAX starts: the allocator, the compilation cache, the devices.

Imports nothing heavy, so that a wrong command line is answered at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput, Failed
from mukv.storage.files import cache_folder
from mukv.train import rendezvous

ALLOCATOR = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=34359738368"
"""Huge pages, and no memory handed back between steps: 1.6 to 1.9 times faster training steps on
a CPU (benchmarks/train_step.py measures with it)."""


HEAVY = frozenset(
    {"demo", "train", "eval", "generate", "chat", "sweep", "transfer", "compress", "bench"}
)
"""Commands that train or decode, so that allocation counts."""
ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "kfd", "vfio/[0-9]*")
"""Devices of GPUs and TPUs in /dev."""


def restart_with_allocator() -> None:
    """Start this command again with settings for the allocator of glibc, where that helps.

    glibc reads GLIBC_TUNABLES only when a process starts, so that a running command can't change
    it: hence the second start, which costs some 30 ms before anything heavy is imported. It is left
    out where it has no effect (another C library, a command that neither trains nor decodes, an
    accelerator, whose memory glibc does not allocate) and where GLIBC_TUNABLES is set, if only to
    the empty text.
    """
    if allocator_helps(sys.argv[1:]):
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, "-m", "mukv", *sys.argv[1:]])


def allocator_helps(words: Sequence[str]) -> bool:
    """Whether the allocator's settings are not made yet and make this command line faster."""
    command = next((word for word in words if not word.startswith("-")), None)
    if command not in HEAVY or {"-h", "--help"} & set(words) or "GLIBC_TUNABLES" in os.environ:
        return False
    return has_glibc() and not has_accelerator()


def has_glibc() -> bool:
    """Whether the C library is that of GNU, which only Linux has here."""
    return sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names


def has_accelerator(devices: Path = Path("/dev")) -> bool:
    """Whether JAX may find a GPU or TPU, told without the seconds that importing JAX takes."""
    chosen = os.environ.get("JAX_PLATFORMS")
    if chosen:
        return chosen != "cpu"
    return any(next(devices.glob(name), None) is not None for name in ACCELERATORS)


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
    # A command compiles dozens of small programs, a second in all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
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
