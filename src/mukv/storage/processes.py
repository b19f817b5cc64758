"""What the processes of one job (`--distributed`) do together."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from mukv.core.errors import BadInput
from mukv.storage.locks import one_writer

TOLD = 2048
"""Bytes of an error that the first process tells the others."""


@contextmanager
def one_job_writes(folder: Path) -> Iterator[None]:
    """Hold a folder against other jobs: process 0 takes its lock.

    Raises BadInput, in every process, with the number of the process that holds it.
    """
    with ExitStack() as held:
        first_alone(lambda: held.enter_context(one_writer(folder)))
        yield


def first_alone(work: Callable[[], object]) -> None:
    """Let process 0 do some work; every process returns, or raises its BadInput, after it."""
    refused: BadInput | None = None
    if jax.process_index() == 0:
        try:
            work()
        except BadInput as error:
            refused = error
    if jax.process_count() > 1:
        told = [] if refused is None else [refused.where, str(refused.given), refused.allowed]
        text = json.dumps(told).encode().ljust(TOLD)
        assert len(text) == TOLD
        received = np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8)))
        told = json.loads(received.tobytes())
        refused = BadInput(*told) if told else None
    if refused is not None:
        raise refused
