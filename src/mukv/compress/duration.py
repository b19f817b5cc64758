"""Estimate how long a comparison of policies takes, from operations and bytes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mukv.compress.measure import Job
from mukv.compress.reader import ROUNDS, STEPS, PolicyReader, strings_together
from mukv.compress.rows import Rows
from mukv.core import params
from mukv.model.counting import flops_per_token

COMPILE_SECONDS = 3.0
"""Compilation for one policy on an idle core: the decoding loop of a model of 30 layers."""
CHOICE = 1 / 16
"""Time of a policy's choice as a share of that of the prefill."""
REPLAY = 2.5
"""Time of reading a prompt again, behind its own cache, as a multiple of that of the prefill."""
BYTES_PER_SECOND, FLOPS_PER_SECOND = 8e9, 1e11
"""Speed of an idle machine: at which a decoding step reads weights, and of products."""
CALIBRATION = 512, 1024
"""Rows and width of the product whose speed is measured."""


class Work:
    """Estimated seconds of all jobs, and of those parts that are done."""

    def __init__(self, reader: PolicyReader, rows: Rows, left: Sequence[Job], aware: bool):
        model, speed = reader.model, _flops_per_second()
        # Ratio of this machine's time to that of an idle one.
        busy = max(1.0, FLOPS_PER_SECOND / speed)
        read, whole = (flops_per_token(model, n) / 3 / speed for n in (rows.read, rows.length))
        step = 4 * params.count(model.params()) / BYTES_PER_SECOND
        prefill = rows.read * read
        batch = max((job.rows.stop - job.rows.start for job in left), default=1)
        count, size = rows.strings.shape[1], rows.strings.shape[2] - 1
        asked, chunks = count * size, math.ceil(count / strings_together(batch, count, size))
        groups = math.ceil(count / rows.together) if aware else 0
        text = CHOICE * prefill + (rows.length - rows.read) * whole
        strings = (1 + groups) * CHOICE * prefill + (2 if groups else 1) * asked * whole
        self.parts = {
            "prefill": batch * prefill,
            "text": batch * text / reader.blocks,
            "strings": batch * strings / (chunks + groups),
            "replay": batch * REPLAY * prefill,
            "policy": busy * (COMPILE_SECONDS + 2 * (ROUNDS + 1) * STEPS * step),
        }
        """Estimated seconds of each part, by its name in `measured`."""
        batches = {(job.kind, job.rows.start) for job in left}
        self.seconds = len(batches) * self.parts["prefill"]
        for job in left:
            some = reader.blocks if job.kind == "text" else chunks + groups
            self.seconds += some * self.parts[job.kind] + job.first * self.parts["policy"]
            if job.candidate.policy.keep.replays:
                times = 1 + job.first if job.kind == "text" else 1 + groups
                self.seconds += times * self.parts["replay"]
        self.spent = 0.0

    def done(self, kind: str) -> int:
        """Count one more part as done; return the percentage of the work that is done."""
        self.spent = min(self.seconds, self.spent + self.parts[kind])
        return int(100 * self.spent / self.seconds)

    def left(self, elapsed: float) -> float:
        """Return the seconds of the remaining jobs, if they run as fast as the finished ones, which
        took `elapsed` seconds."""
        if not self.spent:
            return self.seconds
        return elapsed * (self.seconds - self.spent) / self.spent


def _flops_per_second() -> float:
    """Measure the speed of a product of float32 matrices."""
    rows, width = CALIBRATION
    one, other = jnp.ones((rows, width)), jnp.ones((width, width))
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(one, other))
    start = time.perf_counter()
    for _ in range(3):
        jax.block_until_ready(product(one, other))
    return 3 * 2 * rows * width * width / (time.perf_counter() - start)
