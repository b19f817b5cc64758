"""The base class of optimizers, with weight decay, Adam's moments and per-weight factors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from mukv.core.errors import BadInput
from mukv.core.params import LAYER, Param, map_params
from mukv.core.table import Component
from mukv.core.typing import Array, Number
from mukv.scaling.budget import Change
from mukv.scaling.stability import UpdateFamily

AVERAGES = ("beta1", "beta2", "momentum")


@dataclass(frozen=True)
class Optimizer(Component):
    """Base class of the optimizers, with weight decay.

    weight_decay: fraction of a weight, times the schedule's learning rate, that each step
        subtracts; gains and biases never decay
    decay: "independent" of a weight's own learning rate, so that the product of rate and decay is
        the same at every width (Wortsman et al. 2023; Kosson et al. 2025), or "coupled" to it
    """

    family: ClassVar[UpdateFamily] = "adam"

    weight_decay: float = 0.1
    decay: Literal["independent", "coupled"] = "independent"

    def __post_init__(self) -> None:
        if self.weight_decay < 0:
            raise BadInput("weight_decay", self.weight_decay, "at least 0")
        for name in AVERAGES:
            if hasattr(self, name) and not 0 <= getattr(self, name) < 1:
                raise BadInput(name, getattr(self, name), "at least 0 and below 1")
        for name in ("epsilon", "outer", "inner", "clip_threshold"):
            if getattr(self, name, 1) <= 0:
                raise BadInput(name, getattr(self, name), "greater than 0")

    def changed(self, change: Change) -> Any:
        """Return this optimizer for another batch size or number of tokens. Raises BadInput if a
        beta would become negative.
        """
        rules: dict[str, Callable[[float], float]] = {
            "weight_decay": lambda decay: decay * change.decay,
            "epsilon": lambda epsilon: epsilon * change.epsilon,
            **dict.fromkeys(AVERAGES, lambda beta: 1 - (1 - beta) * change.forgetting),
        }
        present = {name: rule for name, rule in rules.items() if hasattr(self, name)}
        return replace(self, **{name: rule(getattr(self, name)) for name, rule in present.items()})

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        """Build the transformation from gradients to updates, before per-weight learning rates and
        decay.

        declared: tree of each weight's `Param`
        resolved: tree of each weight's `scaling.parameterization.Resolved`
        """
        raise NotImplementedError

    def transform(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        """Build the transformation from gradients to updates for a learning rate of 1.

        declared: tree of each weight's `Param`
        resolved: tree of each weight's `scaling.parameterization.Resolved`
        """
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

    def apply(self, declared: Any, resolved: Any, weights: Any, updates: Any, rate: Number) -> Any:
        """Return the weights after an update.

        declared, resolved: as in `transform`
        updates: what the transformation returned
        rate: the schedule's learning rate
        """
        return jax.tree.map(lambda weight, update: weight + rate * update, weights, updates)


def by_layer(param: Param, function: Callable[..., Any], *arrays: Array) -> Any:
    """Apply `function` to each layer's slice of a stacked weight, or to the whole weight otherwise.

    This is a loop, not a vmap: sums over a slice and over a separate array are then the same
    program, so that stacked and separate layers give the same bits.
    """
    return _each(int(LAYER in param.dims), function, *arrays)


def by_matrix(param: Param, function: Callable[..., Any], *arrays: Array) -> Any:
    """Apply `function` to each matrix of a stacked weight, that is, to each expert of each layer.
    All arrays have the leading axes of the weight."""
    return _each(len(param.leading), function, *arrays)


def _each(axes: int, function: Callable[..., Any], *arrays: Array) -> Any:
    """Apply `function` to each part along the first `axes` axes."""
    if axes == 0:
        return function(*arrays)
    return jax.lax.map(lambda parts: _each(axes - 1, function, *parts), arrays)


def global_norm(declared: Any, gradient: Any) -> Array:
    """Compute the Euclidean norm of a whole gradient: float32 scalar.

    Squares are summed layer by layer and the sums are added in order of size, so that the norm is
    the same to the bit however the layers are stacked.
    """

    def squares(param: Param, leaf: Array) -> Array:
        return by_layer(param, lambda part: jnp.sum(part**2), leaf).reshape(-1)

    sums = jax.tree.leaves(map_params(squares, declared, gradient))
    return jnp.sqrt(jnp.sum(jnp.sort(jnp.concatenate(sums))))


class Moments(NamedTuple):
    """State of Adam: updates done (int32 scalar), running means of gradients and of
    their squares.
    """

    steps: Array
    mean: Any
    square: Any


def adam(
    beta1: Number, beta2: Number, ratio: Callable[..., Array], epsilons: Any
) -> optax.GradientTransformation:
    """Build Adam's transformation with another formula for the update.

    ratio: update from the bias-corrected mean, the bias-corrected mean square and the weight's
        epsilon
    epsilons: tree of each weight's epsilon
    """

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


def scale_by_tree(factors: Any) -> optax.GradientTransformation:
    """Multiply each update by its own factor."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        return jax.tree.map(lambda update, factor: update * factor, updates, factors), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decay_by_tree(shares: Any) -> optax.GradientTransformation:
    """Add to each update its own fraction of the weight."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        added = jax.tree.map(lambda u, share, weight: u + share * weight, updates, shares, params)
        return added, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
