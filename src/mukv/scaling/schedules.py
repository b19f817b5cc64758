"""Learning-rate schedules: `rate(step, plan)` gives the learning rate of a step.

To add a schedule, write a class and add a line to the table. If a schedule depends on the number of
steps only in its final decay, `stable_until` returns the step at which that decay begins, so that a
run can be extended from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

import jax.numpy as jnp

from mukv.core.counts import INT32, require_counts
from mukv.core.errors import BadInput
from mukv.core.table import Component, PartTable
from mukv.core.typing import Array, Float, Int

Rate = Float[Array, ""]
Share = Float[Array, ""]


class Plan(NamedTuple):
    """Inputs of a schedule besides the step.

    peak: highest learning rate
    steps: total steps of the run
    tokens: tokens per step
    """

    peak: float
    steps: int
    tokens: int


@dataclass(frozen=True)
class Schedule(Component):
    """Base class of the schedules.

    warmup: steps of the linear warm-up
    """

    warmup: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.warmup <= INT32:
            raise BadInput("warmup", self.warmup, f"at least 0 steps, at most {INT32:,}")

    def rate(self, step: Int[Array, ""], plan: Plan) -> Rate:
        """Compute the learning rate of the update after `step` completed updates;
        float32 scalar.
        """
        rise = (step + 1) / jnp.maximum(self.warmup, 1)
        risen = self.after(jnp.maximum(step, self.warmup), plan)
        return (jnp.where(step < self.warmup, rise, 1.0) * risen).astype(jnp.float32)

    def after(self, step: Int[Array, ""], plan: Plan) -> Rate:
        """Compute the learning rate after the warm-up. The warm-up rises to the value at step
        `warmup`.
        """
        raise NotImplementedError

    def stable_until(self, steps: int) -> int | None:
        """Return the step until which a run of more steps has the same learning rates; None if
        there is no such step.
        """
        return None

    def _progress(self, step: Int[Array, ""], plan: Plan) -> Share:
        """Compute the completed fraction of the run: 0 at the end of the warm-up, 1 at the last
        update.
        """
        span = jnp.maximum(plan.steps - 1 - self.warmup, 1)
        return jnp.clip((step - self.warmup) / span, 0, 1)


@dataclass(frozen=True)
class Falling(Schedule):
    """Schedules that fall from the peak right after the warm-up.

    final: learning rate of the last update, as a fraction of the peak
    """

    final: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.final <= 1:
            raise BadInput("final", self.final, "a fraction between 0 and 1")


@dataclass(frozen=True)
class Cosine(Falling):
    """Fall along half a period of a cosine (Loshchilov and Hutter 2016)."""

    kind: Literal["cosine"] = "cosine"

    def after(self, step: Int[Array, ""], plan: Plan) -> Rate:
        fall = 0.5 * (1 + jnp.cos(jnp.pi * self._progress(step, plan)))
        return plan.peak * (self.final + (1 - self.final) * fall)


@dataclass(frozen=True)
class Linear(Falling):
    """Fall linearly."""

    kind: Literal["linear"] = "linear"

    def after(self, step: Int[Array, ""], plan: Plan) -> Rate:
        return plan.peak * (1 - (1 - self.final) * self._progress(step, plan))


DECAYS: dict[str, Callable[[Share], Share]] = {
    # 0.01 ** share ends at 0.01; subtracting that (and rescaling) makes it end at zero.
    "exponential": lambda share: (0.01**share - 0.01) / 0.99,
    "linear": lambda share: 1 - share,
    "root": lambda share: 1 - jnp.sqrt(share),
}
"""Factor of the learning rate, from 1 to 0, by the completed fraction of the final decay."""


@dataclass(frozen=True)
class Prolongable(Schedule):
    """Schedules with a stable phase that does not depend on the end, then a decay to zero.

    The learning rate reaches zero one step after the last update, so that the last update still has
    an effect.

    decay: length of the final decay, as a fraction of all steps
    shape: factor of the learning rate at the fraction s of the final decay: 1 - s (linear),
        1 - sqrt(s) (root), or 0.01 ** s, shifted and scaled to end at 0 (exponential)
    """

    decay: float = 0.1
    shape: Literal["exponential", "linear", "root"] = "exponential"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.decay <= 1:
            raise BadInput("decay", self.decay, "a fraction between 0 and 1")

    def stable(self, step: Int[Array, ""], plan: Plan) -> Rate:
        """Compute the learning rate without the final decay."""
        raise NotImplementedError

    def stable_until(self, steps: int) -> int | None:
        return steps - round(self.decay * steps)

    def after(self, step: Int[Array, ""], plan: Plan) -> Rate:
        start = plan.steps - jnp.round(self.decay * plan.steps).astype(jnp.int32)
        share = jnp.clip((step - start) / jnp.maximum(plan.steps - start, 1), 0, 1)
        return self.stable(jnp.minimum(step, start), plan) * DECAYS[self.shape](share)


@dataclass(frozen=True)
class WSD(Prolongable):
    """Warm-up, stable, decay (Hu et al. 2024)."""

    kind: Literal["wsd"] = "wsd"

    def stable(self, step: Int[Array, ""], plan: Plan) -> Rate:
        return jnp.asarray(plan.peak)


@dataclass(frozen=True)
class InverseSqrt(Prolongable):
    """Keep the peak until step `reference`, then peak * sqrt(reference / step) (Vaswani et al.
    2017).

    reference: step until which the peak is kept
    """

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    reference: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "reference", unit="step")

    def stable(self, step: Int[Array, ""], plan: Plan) -> Rate:
        return plan.peak * jnp.sqrt(jnp.minimum(1.0, self.reference / jnp.maximum(step, 1)))


TOKENS_PER_SEQUENCE = 4096
"""Tokens per unit in which the power scheduler's paper counts a batch."""


@dataclass(frozen=True)
class Power(Prolongable):
    """Power scheduler: min(peak, batch * amplitude * tokens ** exponent).

    Shen et al. 2024, equations 7 and 8, with the batch in units of 4,096 tokens and the number of
    tokens seen so far. One setting serves any number of tokens and any batch size.

    amplitude: factor of the power law
    exponent: power of the number of tokens seen so far; at most 0
    """

    kind: Literal["power"] = "power"
    amplitude: float = 4.0
    exponent: float = -0.51

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.amplitude <= 0:
            raise BadInput("amplitude", self.amplitude, "greater than 0")
        if self.exponent > 0:
            raise BadInput("exponent", self.exponent, "at most 0")

    def stable(self, step: Int[Array, ""], plan: Plan) -> Rate:
        batch = plan.tokens / TOKENS_PER_SEQUENCE
        seen = plan.tokens * jnp.maximum(step, 1).astype(jnp.float32)
        return jnp.minimum(plan.peak, batch * self.amplitude * seen**self.exponent)


SCHEDULES = PartTable(
    "schedule",
    Schedule,
    {
        "cosine": Cosine,
        "linear": Linear,
        "wsd": WSD,
        "inverse_sqrt": InverseSqrt,
        "power": Power,
    },
)
AnySchedule = Annotated[Schedule, SCHEDULES]
