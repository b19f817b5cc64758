"""The training state, its sharding, and the metrics of a step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from mukv.core import params
from mukv.core.mesh import replicated, weight_shardings
from mukv.core.typing import Array, Float


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class State:
    """Training state.

    weights: float32 weights that are trained: all weights of the model, or only its adapters
    optimizer: state of the optimizer, float32
    step: updates done, int32 scalar
    """

    weights: Any
    optimizer: Any
    step: Any


class Metrics(NamedTuple):
    """Metrics of one step.

    loss: nats per token, before the update
    gradient_norm: Euclidean norm of the whole gradient, before clipping
    learning_rate: learning rate of the schedule
    counts: numbers that the model logs, per token; see `ForwardResult.counts`. With a teacher also
        `divergence` in nats per token, before the update
    """

    loss: Float[Array, ""]
    gradient_norm: Float[Array, ""]
    learning_rate: Float[Array, ""]
    counts: dict[str, Float[Array, ""]]


def state_shardings(declared: Any, optimizer: Any, mesh: Any) -> State:
    """Return the sharding of each part of the state; a `Mesh` or an `AbstractMesh` will do.

    declared: tree of `Param` of the trained weights. optimizer: its transformation
    """
    weights, whole = weight_shardings(declared, mesh), replicated(mesh)
    shapes = params.abstract(declared)
    shaped = {name: leaf.shape for name, leaf in params.named(shapes).items()}
    placed = params.named(weights)

    def place(path: Any, leaf: Any) -> Any:
        # A leaf of the optimizer's state belongs to the weight whose name its path ends with.
        for start in range(len(path)):
            name = jax.tree_util.keystr(path[start:], simple=True, separator=".")
            if shaped.get(name) == leaf.shape:
                return placed[name]
        return whole

    state = jax.eval_shape(optimizer.init, shapes)
    return State(weights, jax.tree.map_with_path(place, state), whole)
