"""The interface of parts that are trained while the weights of a model stay as they are."""

from __future__ import annotations

from typing import Any, ClassVar

import jax

from mukv.core.params import Param
from mukv.core.table import Component
from mukv.core.typing import Array
from mukv.model.base import LanguageModel
from mukv.model.evicting import AnyThrough
from mukv.model.loss import Teacher
from mukv.scaling.stability import UpdateFamily

WHERE = "train.adapter"


class Adapting(Component):
    """Base class of what `train.adapter` names; the fields are the YAML keys."""

    kind_may_be_left_out: ClassVar[bool] = False
    """Whether a mapping without `kind` is of this class."""

    def check(self, model: LanguageModel, training: Any) -> None:
        """Raise BadInput if the part does not fit the model or the `Training`."""
        self.params(model.params())

    def params(self, declared: Any) -> dict[str, Any]:
        """Declare the weights that are trained, in a tree like the model's. Raises BadInput if the
        model has no place for them."""
        raise NotImplementedError

    def resolved(self, model: LanguageModel, family: UpdateFamily = "adam") -> Any:
        """Compute the `Resolved` of each trained weight, for a family of optimizers."""
        declared = self.params(model.params())
        return model.scaling.resolve(declared, len(model.layers), family)

    def attached(self, model: LanguageModel, base: Any, own: Any) -> Any:
        """Return the weights as the forward pass takes them, multiplied by their multipliers.

        base: weights of the model, as they are stored. own: trained weights, as they are stored
        """
        raise NotImplementedError

    def merged(self, model: LanguageModel, base: Any, own: Any) -> Any:
        """Return float32 weights of the model that compute the same function. base, own: as in
        `attached`; the result has the form in which weights are stored
        """
        raise NotImplementedError

    def drawn(self, batch: Any, training: Any, step: Array) -> Any:
        """Return the batch of a step with the numbers of each row that the objective needs."""
        return batch

    def reading(self, batch: Any, through: AnyThrough | None) -> AnyThrough | None:
        """Return what is in place while rows are read.

        batch: with the numbers of `drawn` in training. through: that of the training plan
        """
        return through

    def teacher(
        self, batch: Any, model: LanguageModel, weights: Any, given: Teacher | None
    ) -> Teacher | None:
        """Return the teacher. weights: of the model, from `attached`. given: that of the training
        plan"""
        return given


def structure(declared: Any) -> Any:
    """Return the tree structure of declared weights."""
    return jax.tree.structure(declared, is_leaf=lambda leaf: isinstance(leaf, Param))
