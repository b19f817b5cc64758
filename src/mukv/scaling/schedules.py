"""How the learning rate goes with the step, as a factor of its peak."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp

from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float, Int


@dataclass(frozen=True)
class Cosine:
    """Linear warm-up, then half a cosine down to a fraction (Loshchilov and Hutter 2016).

    warmup: steps until the peak. final: fraction of the peak that is left at the last step.
    """

    kind: Literal["cosine"] = "cosine"
    warmup: int = 0
    final: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise BadInput("warmup", self.warmup, "at least 0 steps")
        if not 0 <= self.final <= 1:
            raise BadInput("final", self.final, "a fraction between 0 and 1")

    def factor(self, step: Int[Array, ""], steps: int) -> Float[Array, ""]:
        """For the update after `step` completed ones, of `steps` in all."""
        rise = (step + 1) / max(self.warmup, 1)
        progress = (step - self.warmup) / max(steps - self.warmup, 1)
        fall = self.final + (1 - self.final) * 0.5 * (
            1 + jnp.cos(jnp.pi * jnp.clip(progress, 0, 1))
        )
        return jnp.where(step < self.warmup, rise, fall).astype(jnp.float32)


SCHEDULES = {"cosine": Cosine}
AnySchedule = Cosine
