"""Muon: update hidden matrices by their orthogonalised momentum (Jordan et al. 2024)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.params import Param, as_matrices, from_matrices, map_params
from mukv.core.typing import Array
from mukv.scaling.updates import Moments, Optimizer, by_matrix


@dataclass(frozen=True)
class Muon(Optimizer):
    """Update hidden matrices by their orthogonalised momentum and all other weights by Adam.

    The update of a matrix has singular values near sqrt(fan_out / fan_in), so that it changes
    activations by the same amount at every width and learning rates transfer (Jordan et al. 2024).

    momentum: decay of the momentum of hidden matrices
    iterations: Newton-Schulz steps of the orthogonalisation, 1 to 100
    rate: learning rate of hidden matrices, as a multiple of that of the other weights
    beta1: decay of Adam's running mean of gradients, for all other weights
    beta2: decay of Adam's running mean of squared gradients, for all other weights
    epsilon: number that Adam adds to the root of the mean square, for all other weights
    epsilon_by: "all" uses `epsilon` for each of these weights; "layer" scales it with the size of
        the weight's gradient as the model widens, so that its effect is the same at every width
        (Everett et al. 2024, section 4.4)
    """

    kind: Literal["muon"] = "muon"
    momentum: float = 0.95
    iterations: int = 5
    rate: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    epsilon_by: Literal["all", "layer"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "iterations", most=100)
        if self.rate <= 0:
            raise BadInput("rate", self.rate, "greater than 0")

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        """Return the transformation of gradients to updates, before the learning rate.

        Its state has a momentum for each weight, and a mean of squares only for Adam's weights.
        """

        def init(params: Any) -> Moments:
            square = map_params(
                lambda param, weight: jnp.zeros(() if is_matrix(param) else weight.shape),
                declared,
                params,
            )
            return Moments(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params), square)

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Moments]:
            steps = state.steps + 1

            def one(
                param: Param, weight: Any, slope: Array, mean: Array, square: Array
            ) -> tuple[Array, Array, Array]:
                if is_matrix(param):
                    mean = self.momentum * mean + slope
                    even = orthogonal(param, slope + self.momentum * mean, self.iterations)
                    # The update of the matrix as the forward pass uses it must not depend on the
                    # width, so the multiplier and the learning rate of Adam's scaling are divided
                    # out. CompleteP's factors, which depend on the depth, are kept.
                    depth = weight.depth_multiplier * weight.depth_rate
                    share = depth / (weight.multiplier * weight.learning_rate)
                    return self.rate * share * even, mean, square
                mean = self.beta1 * mean + (1 - self.beta1) * slope
                square = self.beta2 * square + (1 - self.beta2) * slope**2
                root = jnp.sqrt(square / (1 - self.beta2**steps))
                epsilon = self.epsilon * (weight.epsilon if self.epsilon_by == "layer" else 1.0)
                return mean / (1 - self.beta1**steps) / (root + epsilon), mean, square

            rows = map_params(one, declared, resolved, updates, state.mean, state.square)
            updates, mean, square = (
                map_params(lambda _, row, i=i: row[i], declared, rows) for i in range(3)
            )
            return updates, Moments(steps, mean, square)

        return optax.GradientTransformation(init, update)


def is_matrix(param: Param) -> bool:
    """Whether Muon's rule applies: a hidden matrix (one per layer and expert) that is contracted
    over at least one dimension and randomly initialised."""
    return param.role == "hidden" and param.init == "normal" and len(param.fan_in) > 0


def orthogonal(param: Param, update: Array, iterations: int) -> Array:
    """Orthogonalise the matrix of each layer and expert; returns an array of the shape of `update`
    whose matrices have all singular values near sqrt(fan_out / fan_in)."""
    flat = as_matrices(param, update)
    rows, columns = flat.shape[-2:]
    norm = by_matrix(param, jnp.linalg.norm, flat)[..., None, None]
    flat = flat / jnp.maximum(norm, 1e-20)
    turned = flat.swapaxes(-1, -2) if rows > columns else flat
    even = newton_schulz(turned, iterations)
    even = even.swapaxes(-1, -2) if rows > columns else even
    return from_matrices(param, math.sqrt(columns / rows) * even)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that Muon's authors chose for fast convergence; singular
values end between about 0.7 and 1.2."""


def newton_schulz(matrices: Array, iterations: int) -> Array:
    """Bring the singular values of matrices near 1 by Newton-Schulz iterations.

    matrices: [*_ rows columns] with rows <= columns and Frobenius norm at most 1.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices
    for _ in range(iterations):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
