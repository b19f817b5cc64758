"""Optimizers over optax, with each weight's own learning rate and decay.

`transform` turns gradients into updates of the size of one learning rate; the caller multiplies
by the schedule's rate, so that the rate stays a plain traced number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import optax

from mukv.core.errors import BadInput


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019). Gains never decay."""

    kind: Literal["adamw"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise BadInput(name, getattr(self, name), "at least 0 and below 1")
        if self.epsilon <= 0:
            raise BadInput("epsilon", self.epsilon, "greater than 0")
        if self.weight_decay < 0:
            raise BadInput("weight_decay", self.weight_decay, "at least 0")

    def transform(self, resolved: Any) -> optax.GradientTransformation:
        """resolved: for each weight its `scaling.parameterization.Resolved`."""
        return optax.chain(
            optax.scale_by_adam(self.beta1, self.beta2, self.epsilon),
            scale_by_tree(jax.tree.map(lambda weight: weight.learning_rate, resolved)),
            optax.add_decayed_weights(
                self.weight_decay, jax.tree.map(lambda weight: weight.decays, resolved)
            ),
            optax.scale(-1.0),
        )


def scale_by_tree(factors: Any) -> optax.GradientTransformation:
    """Multiply each update by its own number."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda update, factor: update * factor, updates, factors), state

    def init(params: Any) -> optax.EmptyState:
        return optax.EmptyState()

    return optax.GradientTransformation(init, update)


OPTIMIZERS = {"adamw": AdamW}
AnyOptimizer = AdamW
