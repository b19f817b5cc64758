"""Coordinate the processes of one job (`--distributed`)."""

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

ERROR_BYTES = 2048
"""Bytes of the message with which process 0 sends an error to the others."""


@contextmanager
def one_job_writes(folder: Path) -> Iterator[None]:
    """Lock a folder against other jobs. Process 0 takes the lock.

    If another job holds the lock, raises BadInput in every process, with the number of the process
    that holds it.
    """
    with ExitStack() as held:
        first_alone(lambda: held.enter_context(one_writer(folder)))
        yield


def first_alone(work: Callable[[], object]) -> None:
    """Let process 0 call `work`; then every process returns, or raises process 0's BadInput."""
    refused: BadInput | None = None
    if jax.process_index() == 0:
        try:
            work()
        except BadInput as error:
            refused = error
    if jax.process_count() > 1:
        message = [] if refused is None else [refused.where, str(refused.given), refused.allowed]
        text = json.dumps(message).encode().ljust(ERROR_BYTES)
        assert len(text) == ERROR_BYTES
        received = np.asarray(multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8)))
        message = json.loads(received.tobytes())
        refused = BadInput(*message) if message else None
    if refused is not None:
        raise refused
