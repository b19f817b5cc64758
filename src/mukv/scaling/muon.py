"""Muon: hidden matrices move by their orthogonalised momentum (Jordan et al. 2024)."""

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
    """Hidden matrices by their orthogonalised momentum, all else as Adam's. An update of a matrix
    has singular values near sqrt(fan_out / fan_in): the change that it makes to activations then
    has the same size at every width, and learning rates transfer.

    rate: of matrices, as a multiple of the learning rate that the others have.
    """

    kind: Literal["muon"] = "muon"
    momentum: float = 0.95
    iterations: int = 5
    rate: float = 1.0
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        require_counts(self, "iterations", most=100)
        if self.rate <= 0:
            raise BadInput("rate", self.rate, "greater than 0")

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        """A matrix has a momentum and no squares."""

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
                    # A matrix as the forward pass sees it moves alike at every width: what its
                    # multiplier and Adam's learning rate do is undone.
                    return (
                        self.rate * even / (weight.multiplier * weight.learning_rate),
                        mean,
                        square,
                    )
                mean = self.beta1 * mean + (1 - self.beta1) * slope
                square = self.beta2 * square + (1 - self.beta2) * slope**2
                root = jnp.sqrt(square / (1 - self.beta2**steps))
                return mean / (1 - self.beta1**steps) / (root + self.epsilon), mean, square

            rows = map_params(one, declared, resolved, updates, state.mean, state.square)
            updates, mean, square = (
                map_params(lambda _, row, i=i: row[i], declared, rows) for i in range(3)
            )
            return updates, Moments(steps, mean, square)

        return optax.GradientTransformation(init, update)


def is_matrix(param: Param) -> bool:
    """Whether a weight maps a width to a width, per layer and expert."""
    return param.role == "hidden" and param.init == "normal" and len(param.fan_in) > 0


def orthogonal(param: Param, update: Array, iterations: int) -> Array:
    """The matrix of each layer, and of each expert, with all its singular values near
    sqrt(fan_out / fan_in)."""
    flat = as_matrices(param, update)
    rows, columns = flat.shape[-2:]
    norm = by_matrix(param, jnp.linalg.norm, flat)[..., None, None]
    flat = flat / jnp.maximum(norm, 1e-20)
    turned = flat.swapaxes(-1, -2) if rows > columns else flat
    even = newton_schulz(turned, iterations)
    even = even.swapaxes(-1, -2) if rows > columns else even
    return from_matrices(param, math.sqrt(columns / rows) * even)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that Muon's authors tuned for speed: singular values
come out between about 0.7 and 1.2."""


def newton_schulz(matrices: Array, iterations: int) -> Array:
    """Singular values to about 1; wide matrices of norm 1 along the last two axes."""
    a, b, c = NEWTON_SCHULZ
    x = matrices
    for _ in range(iterations):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x
