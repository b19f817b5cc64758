"""Adafactor: factored second moments, updates relative to the weight's size, layer by layer.

Shazeer and Stern 2018, algorithms 4 and 5, without momentum. What the paper calls a matrix is one
layer's weight with its contracted axes as rows: a stack of equal layers, which has a leading axis,
is as many matrices, so that a plan said as `repeats: 4` or as a pattern of four trains alike; each
expert is a matrix, too.
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
from mukv.scaling.stability import Family
from mukv.scaling.updates import Optimizer, by_matrix

SMALLEST_FACTORED = 128
"""A matrix with fewer rows or columns keeps every second moment: factors would save little."""
SQUARE_EPSILON = 1e-30
"""Added to squared gradients (epsilon 1 of the paper)."""
SMALLEST_SIZE = 1e-3
"""Root mean square that a weight has at least when its update is scaled (epsilon 2)."""


class Factors(NamedTuple):
    """Updates done, and by weight averages of squared gradients: of rows and columns of a factored
    matrix, of every number otherwise. One number a matrix stands for what is not kept."""

    steps: Array
    rows: Any
    columns: Any
    square: Any


@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Adam with factored second moments and updates relative to the weight's own size.

    decay_rate: the average of step t forgets by t ** -decay_rate. clip_threshold: largest root
    mean square of an update.
    """

    family: ClassVar[Family] = "adafactor"

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
                    partial(self._moved, _matrix(param) if factored(param) else None, forget),
                    *arrays,
                )

            found = map_params(
                one, declared, updates, state.rows, state.columns, state.square, params
            )
            moved, *averages = (
                map_params(lambda _, row, i=i: row[i], declared, found) for i in range(4)
            )
            return moved, Factors(state.steps + 1, *averages)

        return optax.GradientTransformation(init, update)

    def _moved(
        self,
        matrix: tuple[int, int] | None,
        forget: Array,
        slope: Array,
        rows: Array,
        columns: Array,
        square: Array,
        weight: Array,
    ) -> tuple[Array, Array, Array, Array]:
        """The update of one layer's weight, and its averages. matrix: its shape where it is
        factored."""
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
    """Float32 scalar."""
    return jnp.sqrt(jnp.mean(array**2))


def factored(param: Param) -> bool:
    """Whether a weight's second moments are those of its rows and columns."""
    return min(_matrix(param)) >= SMALLEST_FACTORED


def _part(param: Param, shape: tuple[int, ...], kept: bool) -> tuple[int, ...]:
    """The shape of an average over all matrices; one number a matrix stands for what is not
    kept."""
    leading = tuple(param.dims[name] for name in param.leading)
    return (*leading, *(shape if kept else (1,)))


def _matrix(param: Param) -> tuple[int, int]:
    """Rows and columns: the contracted axes and the others, in the order in which they lie; the
    first axis and the others where nothing is contracted."""
    names = [name for name in param.dims if name not in param.leading]
    contracted = set(param.fan_in)
    splits = [k for k in range(1, len(names)) if contracted in (set(names[:k]), set(names[k:]))]
    sizes = param.own_shape
    cut = splits[0] if splits else 1
    return math.prod(sizes[:cut]), math.prod(sizes[cut:])
