"""Adafactor (Shazeer and Stern 2018, algorithms 4 and 5), without momentum.

Second moments are factored into rows and columns, and updates are relative to the weight's size. A
matrix of the paper is the weight of one layer, with its contracted axes as rows. A stack of equal
layers, which has a leading layer axis, is treated as that many matrices, so that `repeats: 4` and a
pattern of four layers train identically; each expert is a matrix as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import optax

from mukv.core.params import Param, map_params
from mukv.core.typing import Array
from mukv.scaling.stability import UpdateFamily
from mukv.scaling.updates import Optimizer, by_matrix

SMALLEST_FACTORED = 128
"""Matrices with fewer rows or columns have unfactored second moments, as factors save little."""
SQUARE_EPSILON = 1e-30
"""Added to squared gradients (epsilon 1 of the paper)."""
SMALLEST_SIZE = 1e-3
"""Lower bound of a weight's root mean square when its update is scaled (epsilon 2)."""


class Factors(NamedTuple):
    """State of Adafactor.

    steps: updates done, int32 scalar
    rows: running mean of squared gradients per row, of factored matrices
    columns: running mean of squared gradients per column, of factored matrices
    square: running mean of squared gradients per element, of all other weights

    Where a weight does not use one of the three means, it has one placeholder number per matrix.
    """

    steps: Array
    rows: Any
    columns: Any
    square: Any


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adam with factored second moments and updates relative to the weight's own size.

    weight_decay: fraction of a weight, times the schedule's learning rate, that each step
        subtracts; gains and biases never decay
    decay_rate: at step t the running means forget a fraction t ** -decay_rate
    clip_threshold: upper bound of an update's root mean square
    """

    family: ClassVar[UpdateFamily] = "adafactor"

    kind: Literal["adafactor"] = "adafactor"
    weight_decay: float = 0.0
    decay_rate: float = 0.8
    clip_threshold: float = 1.0

    def direction(self, declared: Any, resolved: Any) -> optax.GradientTransformation:
        def init(params: Any) -> Factors:
            def zeros(shape: Callable[[Param], tuple[int, ...]]) -> Any:
                return map_params(lambda param: jnp.zeros(shape(param), jnp.float32), declared)

            return Factors(
                jnp.zeros((), jnp.int32),
                zeros(lambda param: _part(param, _matrix(param)[:1], factored(param))),
                zeros(lambda param: _part(param, _matrix(param)[1:], factored(param))),
                zeros(lambda param: _part(param, param.own_shape, not factored(param))),
            )

        def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Factors]:
            forget = (state.steps + 1.0) ** -self.decay_rate

            def one(param: Param, *arrays: Array) -> Any:
                return by_matrix(
                    param,
                    partial(
                        self._update_layer, _matrix(param) if factored(param) else None, forget
                    ),
                    *arrays,
                )

            updated = map_params(
                one, declared, updates, state.rows, state.columns, state.square, params
            )
            moved, *averages = (
                map_params(lambda _, row, i=i: row[i], declared, updated) for i in range(4)
            )
            return moved, Factors(state.steps + 1, *averages)

        return optax.GradientTransformation(init, update)

    def _update_layer(
        self,
        matrix: tuple[int, int] | None,
        forget: Array,
        slope: Array,
        rows: Array,
        columns: Array,
        square: Array,
        weight: Array,
    ) -> tuple[Array, Array, Array, Array]:
        """Compute the update of one layer's weight and its new running means.

        matrix: (rows, columns) of a factored weight; None means not factored
        """
        squared = slope**2 + SQUARE_EPSILON
        if matrix is not None:
            squared = squared.reshape(matrix)
            rows = (1 - forget) * rows + forget * squared.mean(-1)
            columns = (1 - forget) * columns + forget * squared.mean(-2)
            even = ((rows / rows.mean()) ** -0.5)[:, None] * (columns**-0.5)[None]
            moved = slope * even.reshape(slope.shape)
        else:
            square = (1 - forget) * square + forget * squared
            moved = slope * square**-0.5
        moved = moved / jnp.maximum(1.0, root_mean_square(moved) / self.clip_threshold)
        moved = moved * jnp.maximum(root_mean_square(weight), SMALLEST_SIZE)
        return moved, rows, columns, square


def root_mean_square(array: Array) -> Array:
    """Compute the root mean square of all elements: float32 scalar."""
    return jnp.sqrt(jnp.mean(array**2))


def factored(param: Param) -> bool:
    """Whether a weight's second moments are factored into rows and columns."""
    return min(_matrix(param)) >= SMALLEST_FACTORED


def _part(param: Param, shape: tuple[int, ...], kept: bool) -> tuple[int, ...]:
    """Return the shape of a running mean of all matrices of a weight.

    shape: shape of the mean of one matrix
    kept: whether the weight uses this mean; if not, each matrix has one placeholder number
    """
    leading = tuple(param.dims[name] for name in param.leading)
    return (*leading, *(shape if kept else (1,)))


def _matrix(param: Param) -> tuple[int, int]:
    """Return the numbers of rows and columns: the sizes of the contracted axes and of the others,
    in the order of the axes. If no axis is contracted, or the contracted axes are neither first nor
    last, the first axis counts as rows.
    """
    names = [name for name in param.dims if name not in param.leading]
    contracted = set(param.fan_in)
    splits = [k for k in range(1, len(names)) if contracted in (set(names[:k]), set(names[k:]))]
    sizes = param.own_shape
    cut = splits[0] if splits else 1
    return math.prod(sizes[:cut]), math.prod(sizes[cut:])
