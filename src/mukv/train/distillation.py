"""Distillation: a model in training learns from the predictions of another model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh

from mukv.core import params
from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.mesh import weight_shardings
from mukv.model.base import LanguageModel


@dataclass(frozen=True)
class Distillation:
    """How a teacher counts: training minimises (1 - weight) CE + weight T^2 KL.

    CE is the cross-entropy of the text and KL the divergence KL(teacher || model) of the next
    token, both in nats per token. T^2 keeps the size of the gradient (Hinton et al. 2015).

    weight: weight of the divergence, from 0 to 1; with 0 the teacher is not run
    temperature: divisor T of the logits of both models in the divergence
    """

    weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise BadInput("weight", self.weight, "0 to 1")
        if self.temperature <= 0:
            raise BadInput("temperature", self.temperature, "greater than 0")


def abstract_weights(model: LanguageModel, compute: Compute, mesh: Mesh | AbstractMesh) -> Any:
    """Return shapes and shardings of a teacher's weights: scaled, and rounded to the types in which
    the forward pass multiplies, so that they take no more memory than it needs.
    """
    declared = model.params()

    def rounded(weights: Any) -> Any:
        return compute.working_copy(declared, weights)

    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(rounded, params.abstract(declared)),
        weight_shardings(declared, mesh),
    )


def placed_weights(model: LanguageModel, weights: Any, like: Any, mesh: Mesh) -> Any:
    """Put a teacher's weights on the mesh, scaled.

    weights: as they are saved, of any dtype. like: from `abstract_weights`
    """

    def made(weights: Any) -> Any:
        scaled = model.scaled(weights)
        return jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype), scaled, like)

    with jax.set_mesh(mesh):
        shardings = jax.tree.map(lambda shape: shape.sharding, like)
        return jax.jit(made, out_shardings=shardings)(weights)
