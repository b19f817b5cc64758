"""Optimizers over optax, with a learning rate, epsilon and decay per weight.

`transform` turns gradients into updates for a learning rate of 1; the caller multiplies them by the
schedule's learning rate, which is a traced scalar. To add an optimizer, write a class with a
`direction` and the `family` of its learning-rate exponents, and add a line to the table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import optax

from mukv.core.table import PartTable
from mukv.scaling.adafactor import Adafactor
from mukv.scaling.hyperball import Hyperball
from mukv.scaling.muon import Muon
from mukv.scaling.stability import UpdateFamily
from mukv.scaling.updates import Optimizer, adam


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam (Kingma and Ba 2014) with decoupled weight decay (Loshchilov and Hutter 2019).

    beta1: decay of the running mean of gradients
    beta2: decay of the running mean of squared gradients
    epsilon: number that is added to the root of the mean square
    epsilon_by: "all" uses `epsilon` for every weight; "layer" scales it with the size of each
        weight's gradient as the model widens, so that its effect is the same at every width
        (Everett et al. 2024, section 4.4)
    """

    kind: Literal["adamw"] = "adamw"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    epsilon_by: Literal["all", "layer"] = "all"

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        by_layer = self.epsilon_by == "layer"
        epsilons = jax.tree.map(
            lambda weight: self.epsilon * (weight.epsilon if by_layer else 1.0), resolved
        )
        return adam(
            self.beta1,
            self.beta2,
            lambda mean, square, epsilon: mean / (jnp.sqrt(square) + epsilon),
            epsilons,
        )


@dataclass(frozen=True)
class AdamAtan2(Optimizer):
    """Adam without an epsilon: update = outer * atan2(m, inner * sqrt(v)).

    Everett et al. 2024, section 4.5. Updates are bounded and invariant to the scale of the
    gradients. The default of `outer`, 4 / pi, makes the first step as long as Adam's.

    beta1: decay of the running mean of gradients
    beta2: decay of the running mean of squared gradients
    outer: factor of the update
    inner: factor of the root of the mean square
    """

    kind: Literal["adam_atan2"] = "adam_atan2"
    beta1: float = 0.9
    beta2: float = 0.95
    outer: float = 4 / math.pi
    inner: float = 1.0

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        return adam(
            self.beta1,
            self.beta2,
            lambda mean, square, _: self.outer * jnp.arctan2(mean, self.inner * jnp.sqrt(square)),
            jax.tree.map(lambda _: 0.0, resolved),
        )


@dataclass(frozen=True)
class Lion(Optimizer):
    """Update by the sign of a running mean (Chen et al. 2023). Learning rates scale as Adam's.

    beta1: weight of the running mean in the update
    beta2: decay of the running mean of gradients
    """

    kind: Literal["lion"] = "lion"
    beta1: float = 0.9
    beta2: float = 0.99

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.beta1, self.beta2)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum.

    momentum: decay of the running sum of gradients
    """

    family: ClassVar[UpdateFamily] = "sgd"

    kind: Literal["sgd"] = "sgd"
    weight_decay: float = 0.0
    momentum: float = 0.9

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        return optax.trace(self.momentum)


@dataclass(frozen=True)
class AdamH(Hyperball, AdamW):
    """Adam with hidden matrices on a sphere (Wen et al. 2026)."""

    kind: Literal["adamh"] = "adamh"  # pyright: ignore[reportIncompatibleVariableOverride]


@dataclass(frozen=True)
class MuonH(Hyperball, Muon):
    """Muon with hidden matrices on a sphere (Wen et al. 2026), all other weights by Adam.

    Its budget rule is `hyperp` (Ren et al. 2026).
    """

    kind: Literal["muonh"] = "muonh"  # pyright: ignore[reportIncompatibleVariableOverride]


OPTIMIZERS = PartTable(
    "optimizer",
    Optimizer,
    {
        "adamw": AdamW,
        "adam_atan2": AdamAtan2,
        "lion": Lion,
        "sgd": SGD,
        "adafactor": Adafactor,
        "muon": Muon,
        "adamh": AdamH,
        "muonh": MuonH,
    },
)
AnyOptimizer = Annotated[Optimizer, OPTIMIZERS]
