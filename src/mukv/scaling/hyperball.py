"""Hyperball optimisation: hidden matrices keep their Frobenius norm (Wen et al. 2026).

A step is W' = R norm(W - rate R norm(u)), where norm(x) = x / |x| (Frobenius), u is the update of
Adam or Muon, and R = |W_0| ("Fantastic Pretraining Optimizers and Where to Find Them II: Hyperball
Optimization", arXiv 2606.16899). The update is the same fraction of the weight at every width, so
no parameterisation scales it; CompleteP's factor for the depth stays, as in HyperP (Ren et al.
2026, arXiv 2603.28743). Weight decay would change nothing to first order and is left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
import optax

from mukv.core.errors import BadInput
from mukv.core.params import Param, map_params
from mukv.core.typing import Array, Number
from mukv.scaling.muon import is_matrix
from mukv.scaling.updates import Optimizer, by_matrix

SMALLEST_NORM = 1e-30
"""Lower bound of a norm that is divided by. A matrix of zeros stays zero."""


@dataclass(frozen=True)
class Hyperball(Optimizer):
    """Base class of the optimizers on a sphere, to be inherited before the one that gives u.

    Hidden matrices that are drawn from a normal distribution are on a sphere, one for each layer
    and expert. All other weights, and matrices that start at zero, which have no radius, are
    updated as the other base class does.

    rate: learning rate of the matrices, as a multiple of that of the other weights; the product
        with the learning rate is the size of an update relative to the matrix
    weight_decay: fraction of a weight, times the schedule's learning rate, that each step
        subtracts from the weights that are not on a sphere; gains and biases never decay
    """

    weight_decay: float = 0.0
    rate: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rate <= 0:
            raise BadInput("rate", self.rate, "greater than 0")

    def transform(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        def undecayed(param: Param, weight: Any) -> Any:
            return replace(weight, decays=weight.decays and not on_sphere(param, weight))

        return super().transform(declared, map_params(undecayed, declared, resolved))

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        base = super().direction(declared, resolved)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            moved, state = base.update(updates, state, params)

            def one(param: Param, weight: Any, move: Array, value: Array) -> Array:
                if not on_sphere(param, weight):
                    return move
                # `transform` multiplies by the whole learning rate of the weight.
                share = self.rate * weight.depth_rate / weight.learning_rate
                return share * by_matrix(param, rescaled, move, value)

            return map_params(one, declared, resolved, moved, params), state

        return optax.GradientTransformation(base.init, update)

    def apply(self, declared: Any, resolved: Any, weights: Any, updates: Any, rate: Number) -> Any:
        """Return the weights after an update, matrices with the norm that they had before.

        This norm is R, since no step changes it but for rounding, so that R needs no state.
        """
        moved = super().apply(declared, resolved, weights, updates, rate)

        def one(param: Param, weight: Any, new: Array, old: Array) -> Array:
            return by_matrix(param, rescaled, new, old) if on_sphere(param, weight) else new

        return map_params(one, declared, resolved, moved, weights)


def on_sphere(param: Param, weight: Any) -> bool:
    """Whether a weight, of which `weight` is the `Resolved`, keeps its norm."""
    zero = not isinstance(weight.deviation, Array) and weight.deviation == 0
    return is_matrix(param) and not zero


def rescaled(array: Array, like: Array) -> Array:
    """Return the array times the factor that gives it the Frobenius norm of `like`."""
    norm, own = (jnp.sqrt(jnp.sum(each**2)) for each in (like, array))
    return array * (norm / jnp.maximum(own, SMALLEST_NORM))
