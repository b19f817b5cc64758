"""What a layer has besides attention: the MLP, and how both join the residual stream."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax

from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.norm import RMSNorm
from mukv.core.params import WIDEST, Param, map_params
from mukv.core.typing import Array, Bool, Residual, Weights
from mukv.model.auxiliary import Auxiliary
from mukv.scaling.parameterization import Scaling

ACTIVATIONS = {"silu": jax.nn.silu, "gelu": lambda x: jax.nn.gelu(x, approximate=True)}


@dataclass(frozen=True)
class Feedforward:
    """The contract; fields are the YAML keys. What a layer does with each token by itself."""

    grows: ClassVar[tuple[str, ...]] = ()
    """Fields that go with the width of the model."""
    kind_may_be_left_out: ClassVar[bool] = False
    """Whether a mapping without `kind` is of this class."""

    def params(self, d_model: int) -> dict[str, Any]:
        """Weights."""
        raise NotImplementedError

    def apply(
        self, weights: Weights, x: Residual, counted: Bool[Array, "batch token"] | None = None
    ) -> tuple[Residual, Auxiliary | None]:
        """What is added to the residual stream; and what a pass over whole rows reports.

        counted: which tokens are no padding, in passes over whole rows (training, evaluation);
        None in prefill and decoding, which report nothing.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Gated(Feedforward):
    """Gated linear unit (Shazeer 2020): down(activation(gate x) * up x)."""

    kind: Literal["gated"] = "gated"
    hidden: int = 128
    activation: Literal["silu", "gelu"] = "silu"

    grows: ClassVar[tuple[str, ...]] = ("hidden",)
    kind_may_be_left_out: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_counts(self, "hidden", most=4 * WIDEST)

    def params(self, d_model: int, axis: str = "hidden") -> dict[str, Param]:
        """axis: name of the inner width."""
        up = Param({"embed": d_model, axis: self.hidden}, fan_in=("embed",))
        down = Param({axis: self.hidden, "embed": d_model}, fan_in=(axis,), ends_branch=True)
        return {"gate": replace(up, tag="gate"), "up": up, "down": down}

    def apply(
        self, weights: Weights, x: Residual, counted: Bool[Array, "batch token"] | None = None
    ) -> tuple[Residual, None]:
        gate = ACTIVATIONS[self.activation](project(x, weights["gate"]))
        return project(gate * project(x, weights["up"]), weights["down"]), None


@dataclass(frozen=True)
class Branching:
    """A branch (attention, MLP) reads the normed stream: x + branch(norm x)."""

    def check(self, norm: RMSNorm, scaling: Scaling) -> None:
        """Raise BadInput if these can't work together."""

    def params(self, name: str, norm: RMSNorm, d_model: int) -> dict[str, Any]:
        """Weights of the branch called `name`."""
        return {f"{name}_norm": norm.params(d_model)}

    def enter(self, weights: Weights, name: str, norm: RMSNorm, x: Residual) -> Residual:
        """What the branch reads."""
        return norm.apply(weights[f"{name}_norm"], x)

    def leave(self, weights: Weights, name: str, norm: RMSNorm, branch: Residual) -> Residual:
        """What is added to the stream."""
        return branch


@dataclass(frozen=True)
class PreNorm(Branching):
    kind: Literal["pre"] = "pre"


@dataclass(frozen=True)
class SandwichNorm(Branching):
    """What a branch gives is normed too: x + norm branch(norm x) (Gemma 2)."""

    kind: Literal["sandwich"] = "sandwich"

    def check(self, norm: RMSNorm, scaling: Scaling) -> None:
        if scaling.depth is not None and norm.stored == "offset":
            allowed = "null: what a branch adds is a gain, stored as offset from one"
            raise BadInput("scaling.depth", scaling.depth, allowed)

    def params(self, name: str, norm: RMSNorm, d_model: int) -> dict[str, Any]:
        # Only the outer gain says how much a branch adds.
        after = map_params(lambda p: replace(p, ends_branch=True), norm.params(d_model))
        return {**super().params(name, norm, d_model), f"{name}_post_norm": after}

    def leave(self, weights: Weights, name: str, norm: RMSNorm, branch: Residual) -> Residual:
        return norm.apply(weights[f"{name}_post_norm"], branch)


AnyResidual = PreNorm | SandwichNorm
