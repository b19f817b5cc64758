"""Configure allocator, compilation cache and devices, which must be set before JAX starts.

Imports no large module, so that a mistyped command line is refused at once.
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

ALLOCATOR = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {
        "hugetlb": 1,
        "mmap_max": 0,
        "trim_threshold": 1 << 35,
        "top_pad": 1 << 28,
    }.items()
)
"""Settings of glibc: use huge pages, and return no memory to the system between steps. Training
steps are 1.6 to 1.9 times faster on a CPU (benchmarks/train_step.py measures with it). The heap
grows by 256 MiB at once, because huge pages are slow to get in small steps, for instance for each
tensor of a checkpoint."""


HEAVY = frozenset(
    {"demo", "train", "eval", "generate", "chat", "sweep", "transfer", "compress", "bench"}
)
"""Commands that train or decode, which the allocator's settings make faster."""
ACCELERATORS = ("nvidia[0-9]*", "accel[0-9]*", "kfd", "vfio/[0-9]*")
"""Names of the device files of GPUs and TPUs in /dev."""


def restart_with_allocator() -> None:
    """Start this command again with settings for the allocator of glibc, if that makes it faster.

    glibc reads GLIBC_TUNABLES only when a process starts. The restart takes some 30 ms, because it
    comes before large modules are imported. The command is not restarted if the settings would have
    no effect (with another C library, for a command that neither trains nor decodes, and with an
    accelerator, whose memory glibc does not allocate) or if GLIBC_TUNABLES is set, even to "".
    """
    if allocator_helps(sys.argv[1:]):
        os.environ["GLIBC_TUNABLES"] = ALLOCATOR
        os.execv(sys.executable, [sys.executable, "-m", "mukv", *sys.argv[1:]])


def allocator_helps(words: Sequence[str]) -> bool:
    """Whether the allocator's settings would make this command faster and are not yet set."""
    command = next((word for word in words if not word.startswith("-")), None)
    if command not in HEAVY or {"-h", "--help"} & set(words) or "GLIBC_TUNABLES" in os.environ:
        return False
    return has_glibc() and not has_accelerator()


def has_glibc() -> bool:
    """Whether the system is Linux and the C library is glibc."""
    return sys.platform == "linux" and "CS_GNU_LIBC_VERSION" in os.confstr_names


def has_accelerator(devices: Path = Path("/dev")) -> bool:
    """Whether JAX may find a GPU or TPU, according to JAX_PLATFORMS and device files (importing JAX
    takes seconds)."""
    chosen = os.environ.get("JAX_PLATFORMS")
    if chosen:
        return chosen != "cpu"
    return any(next(devices.glob(name), None) is not None for name in ACCELERATORS)


def prepare(
    devices: int = 1, distributed: str | None = None, tell: Callable[[str], None] = print
) -> AbstractContextManager[Any]:
    """Configure JAX before its first use: logging, compilation cache, devices, processes.

    devices: number of devices over all processes; on a CPU they are simulated
    distributed: how processes find each other: "auto" or "HOST:PORT,PROCESSES,NUMBER"; None for a
        single process
    tell: function that is called with a line of text while this process waits for others

    Returns a context manager in which to train; with "HOST:PORT,..." it watches the other processes
    (`rendezvous.Watch`). Raises BadInput if `distributed` can't be parsed or the address can't be
    reached, Failed if not all processes connect in time.
    """
    import logging

    import jax

    from mukv.core.mesh import simulate

    # If a save fails, Orbax logs a traceback and asyncio logs one for each failed write, besides
    # the exception that becomes one line here.
    for library in ("absl", "asyncio"):
        logging.getLogger(library).setLevel(logging.CRITICAL)

    compiled = cache_folder() / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(compiled))
    # A command compiles dozens of small programs, a second in all.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    if distributed is None:
        simulate(devices)
        return nullcontext()
    # JAX's own handler of SIGTERM would swallow a signal that comes before training begins.
    jax.config.update("jax_enable_preemption_service", False)
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
    """Whether this is process 0, which prints for all processes of a run."""
    import jax

    return jax.process_index() == 0
