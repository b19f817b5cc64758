"""Optimizers over optax, with each weight's own learning rate, epsilon and decay.

`transform` turns gradients into updates of the size of one learning rate; the caller multiplies
by the schedule's rate, so that the rate stays a plain traced number. To add one: a class with a
`direction` and the family of its learning-rate exponents, and a line in the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mukv.core.errors import BadInput
from mukv.core.params import LAYER, Param, map_params
from mukv.core.typing import Array
from mukv.scaling.stability import Family


@dataclass(frozen=True)
class Optimizer:
    """The contract, and decay.

    weight_decay: share of a weight, times the schedule's learning rate, that each step takes
    off; gains and biases never decay. decay: "independent" of a weight's own learning rate, so
    that the product of rate and decay is the same at every width (Wortsman et al. 2023; Kosson
    et al. 2025), or "coupled" to it.
    """

    family: ClassVar[Family] = "adam"

    weight_decay: float = 0.1
    decay: Literal["independent", "coupled"] = "independent"

    def __post_init__(self) -> None:
        if self.weight_decay < 0:
            raise BadInput("weight_decay", self.weight_decay, "at least 0")
        for name in ("beta1", "beta2", "momentum"):
            if hasattr(self, name) and not 0 <= getattr(self, name) < 1:
                raise BadInput(name, getattr(self, name), "at least 0 and below 1")
        for name in ("epsilon", "outer", "inner", "clip_threshold"):
            if getattr(self, name, 1) <= 0:
                raise BadInput(name, getattr(self, name), "greater than 0")

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        """Gradients to updates, before learning rates of the weights and decay."""
        raise NotImplementedError

    def transform(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        """declared: each weight's `Param`; resolved: its `scaling.parameterization.Resolved`."""
        rates = jax.tree.map(lambda weight: weight.learning_rate, resolved)
        coupled = self.decay == "coupled"
        decays = jax.tree.map(
            lambda weight: weight.decays * (weight.learning_rate if coupled else 1.0), resolved
        )
        return optax.chain(
            self.direction(declared, resolved),
            scale_by_tree(rates),
            decay_by_tree(jax.tree.map(lambda share: share * self.weight_decay, decays)),
            optax.scale(-1.0),
        )


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam (Kingma and Ba 2014) with decoupled decay (Loshchilov and Hutter 2019).

    epsilon_by: "layer" lets it shrink with each weight's gradient as the model widens, so that
    it means the same at every width (Everett et al. 2024, section 4.4).
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
    """Adam without an epsilon: outer * atan2(m, inner * sqrt(v)) (Everett et al. 2024, section
    4.5), bounded and exactly invariant to the scale of gradients. The default of `outer`, 4 / pi,
    makes the first step as long as Adam's.
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
    """The sign of an average (Chen et al. 2023); learning rates scale as Adam's."""

    kind: Literal["lion"] = "lion"
    beta1: float = 0.9
    beta2: float = 0.99

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        return optax.scale_by_lion(self.beta1, self.beta2)


@dataclass(frozen=True)
class SGD(Optimizer):
    """Gradient descent with momentum."""

    family: ClassVar[Family] = "sgd"

    kind: Literal["sgd"] = "sgd"
    weight_decay: float = 0.0
    momentum: float = 0.9

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        return optax.trace(self.momentum)


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adam with factored second moments and updates relative to the weight's own size (Shazeer
    and Stern 2018). clip_threshold: largest root mean square of an update."""

    family: ClassVar[Family] = "adafactor"

    kind: Literal["adafactor"] = "adafactor"
    weight_decay: float = 0.0
    decay_rate: float = 0.8
    clip_threshold: float = 1.0

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        return optax.chain(
            optax.scale_by_factored_rms(decay_rate=self.decay_rate),
            optax.clip_by_block_rms(self.clip_threshold),
            optax.scale_by_param_block_rms(),
        )


@dataclass(frozen=True)
class Muon(Optimizer):
    """Hidden matrices move by their orthogonalised momentum (Jordan et al. 2024), all else as
    Adam's. An update of a matrix has singular values near sqrt(fan_out / fan_in): the change that
    it makes to activations then has the same size at every width, and learning rates transfer.

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
        if self.iterations < 1:
            raise BadInput("iterations", self.iterations, "at least 1")
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


# Parts


class Moments(NamedTuple):
    """Updates done, and averages of gradients and of their squares."""

    steps: Array
    mean: Any
    square: Any


def adam(
    beta1: float, beta2: float, ratio: Callable[..., Array], epsilons: Any
) -> optax.GradientTransformation:
    """`ratio` of unbiased mean, unbiased mean square and each weight's epsilon."""

    def init(params: Any) -> Moments:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return Moments(jnp.zeros((), jnp.int32), zeros, zeros)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Moments]:
        steps = state.steps + 1
        mean = optax.tree.update_moment(updates, state.mean, beta1, 1)
        square = optax.tree.update_moment(updates, state.square, beta2, 2)
        updates = jax.tree.map(
            ratio,
            optax.tree.bias_correction(mean, beta1, steps),
            optax.tree.bias_correction(square, beta2, steps),
            epsilons,
        )
        return updates, Moments(steps, mean, square)

    return optax.GradientTransformation(init, update)


def is_matrix(param: Param) -> bool:
    """Whether a weight maps a width to a width, per layer."""
    return param.role == "hidden" and param.init == "normal" and len(param.fan_in) > 0


def orthogonal(param: Param, update: Array, iterations: int) -> Array:
    """Each layer's matrix with all its singular values near sqrt(fan_out / fan_in)."""
    layers = [size for name, size in param.dims.items() if name == LAYER]
    flat = update.reshape(*layers, param.fan_in_size, -1)
    rows, columns = flat.shape[-2:]
    turned = flat.swapaxes(-1, -2) if rows > columns else flat
    even = newton_schulz(turned, iterations)
    even = even.swapaxes(-1, -2) if rows > columns else even
    return (math.sqrt(columns / rows) * even).reshape(update.shape)


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""Coefficients of the quintic iteration that Muon's authors tuned for speed: singular values
come out between about 0.7 and 1.2."""


def newton_schulz(matrices: Array, iterations: int) -> Array:
    """Singular values to about 1; wide matrices along the last two axes."""
    a, b, c = NEWTON_SCHULZ
    norm = jnp.linalg.norm(matrices, axis=(-2, -1), keepdims=True)
    x = matrices / jnp.maximum(norm, 1e-20)
    for _ in range(iterations):
        gram = x @ x.swapaxes(-1, -2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def scale_by_tree(factors: Any) -> optax.GradientTransformation:
    """Multiply each update by its own number."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda update, factor: update * factor, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_by_tree(shares: Any) -> optax.GradientTransformation:
    """Add to each update its own share of the weight."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        added = jax.tree.map(lambda u, share, weight: u + share * weight, updates, shares, params)
        return added, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


OPTIMIZERS: dict[str, type[Optimizer]] = {
    "adamw": AdamW,
    "adam_atan2": AdamAtan2,
    "lion": Lion,
    "sgd": SGD,
    "adafactor": Adafactor,
    "muon": Muon,
}
AnyOptimizer = AdamW | AdamAtan2 | Lion | SGD | Adafactor | Muon
