"""Stop signals: SIGTERM and SIGINT make a training loop save a checkpoint and stop."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class StopSignal:
    """Records a SIGTERM or SIGINT. A second signal has the effect that it has elsewhere."""

    def __init__(self) -> None:
        self.name: str | None = None
        self.before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGTERM, signal.SIGINT):
            self.before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(number, self.before[number])

    def agreed(self) -> bool:
        """Return whether any process has received a signal. With several processes this is a
        collective, which all of them must call.
        """
        mine = np.asarray(self.name is not None)
        if jax.process_count() == 1:
            return bool(mine)
        return bool(np.any(multihost_utils.process_allgather(mine)))
