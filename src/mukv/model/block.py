"""The feed-forward part of a layer, and the placement of norms in the residual branches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import jax

from mukv.core.broadcast import with_rank
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project, with_bias
from mukv.core.norm import RMSNorm
from mukv.core.params import WIDEST, Param, map_params
from mukv.core.table import Component, PartTable
from mukv.core.typing import Array, Bool, Residual, Weights
from mukv.model.auxiliary import Auxiliary
from mukv.scaling.parameterization import Scaling

Activation = Literal["silu", "gelu", "quick_gelu"]
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
}


@dataclass(frozen=True)
class Feedforward(Component):
    """Base class of feed-forward parts, which process each token independently.

    The fields are the YAML keys.
    """

    grows: ClassVar[tuple[str, ...]] = ()
    """Fields that scale with the width of the model."""
    kind_may_be_left_out: ClassVar[bool] = False
    """Whether a mapping without `kind` is of this class."""

    def params(self, d_model: int) -> dict[str, Any]:
        """Declare the weights."""
        raise NotImplementedError

    def apply(
        self, weights: Weights, x: Residual, counted: Bool[Array, "batch token"] | None = None
    ) -> tuple[Residual, Auxiliary | None]:
        """Compute what is added to the residual stream, and the auxiliary numbers to report.

        counted: which tokens are not padding, in passes over whole rows (training, evaluation);
            None in prefill and decoding, which report nothing
        """
        raise NotImplementedError

    def branch(
        self,
        weights: Weights,
        x: Residual,
        stream: Residual,
        counted: Bool[Array, "batch token"] | None = None,
    ) -> tuple[Residual, Auxiliary | None]:
        """Compute what `apply` does, in a part that also reads the residual stream before the norm
        of the branch. stream: that stream; x: the input of the branch
        """
        return self.apply(weights, x, counted)


@dataclass(frozen=True)
class Gated(Feedforward):
    """Gated linear unit (Shazeer 2020): down(activation(gate x) * up x).

    hidden: inner width
    activation: function of the gate
    """

    kind: Literal["gated"] = "gated"
    hidden: int = 128
    activation: Activation = "silu"

    grows: ClassVar[tuple[str, ...]] = ("hidden",)
    kind_may_be_left_out: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require_counts(self, "hidden", most=4 * WIDEST)

    def params(self, d_model: int, axis: str = "hidden") -> dict[str, Param]:
        """Declare the weights. axis: name of the inner dimension."""
        up = Param({"embed": d_model, axis: self.hidden}, fan_in=("embed",))
        down = Param({axis: self.hidden, "embed": d_model}, fan_in=(axis,), ends_branch=True)
        return {"gate": replace(up, tag="gate"), "up": up, "down": down}

    def apply(
        self, weights: Weights, x: Residual, counted: Bool[Array, "batch token"] | None = None
    ) -> tuple[Residual, None]:
        gate = ACTIVATIONS[self.activation](project(x, weights["gate"]))
        return project(gate * project(x, weights["up"]), weights["down"]), None


@dataclass(frozen=True)
class Ungated(Feedforward):
    """MLP without a gate (Vaswani et al. 2017; GPT-2): down(activation(up x)).

    hidden: inner width
    activation: function of the inner units
    biases: whether both products have a bias
    """

    kind: Literal["ungated"] = "ungated"
    hidden: int = 128
    activation: Activation = "gelu"
    biases: bool = False

    grows: ClassVar[tuple[str, ...]] = ("hidden",)

    def __post_init__(self) -> None:
        require_counts(self, "hidden", most=4 * WIDEST)

    def params(self, d_model: int) -> dict[str, Param]:
        width, inner = {"embed": d_model}, {"hidden": self.hidden}
        declared = {
            "up": Param(width | inner, fan_in=("embed",)),
            "down": Param(inner | width, fan_in=("hidden",), ends_branch=True),
        }
        if self.biases:
            declared["up_bias"] = Param(inner, role="vector", init="zeros")
            declared["down_bias"] = Param(width, role="vector", init="zeros", ends_branch=True)
        return declared

    def apply(
        self, weights: Weights, x: Residual, counted: Bool[Array, "batch token"] | None = None
    ) -> tuple[Residual, None]:
        inner = with_bias(project(x, weights["up"]), weights, "up_bias")
        out = project(ACTIVATIONS[self.activation](inner), weights["down"])
        return with_bias(out, weights, "down_bias"), None


@dataclass(frozen=True)
class Branching(Component):
    """Base class of the placements of norms: each branch computes x + branch(norm(x)).

    layer_scale: whether the residual stream is multiplied by a trained number after each layer,
        which is 1 at first (Gemma 4)
    """

    layer_scale: bool = False

    def check(self, norm: RMSNorm, scaling: Scaling) -> None:
        """Raise BadInput if the norm and the scaling don't fit this placement."""

    def params(self, name: str, norm: RMSNorm, d_model: int) -> dict[str, Any]:
        """Declare the norms of the branch called `name`."""
        return {f"{name}_norm": norm.params(d_model)}

    def layer_params(self) -> dict[str, Any]:
        """Declare the weights of a layer that belong to none of its branches."""
        if not self.layer_scale:
            return {}
        return {"layer_scale": Param({"layer_scale": 1}, role="vector", init="ones")}

    def finish(self, weights: Weights, x: Residual) -> Residual:
        """Return the residual stream after a layer, from its sum with all branches."""
        if not self.layer_scale:
            return x
        return x * with_rank(weights["layer_scale"].astype(x.dtype), x.ndim)

    def enter(self, weights: Weights, name: str, norm: RMSNorm, x: Residual) -> Residual:
        """Return the input of the branch."""
        return norm.apply(weights[f"{name}_norm"], x)

    def leave(self, weights: Weights, name: str, norm: RMSNorm, branch: Residual) -> Residual:
        """Return what is added to the residual stream, from the output of the branch."""
        return branch


@dataclass(frozen=True)
class PreNorm(Branching):
    """Norm before each branch: x + branch(norm(x))."""

    kind: Literal["pre"] = "pre"


class NormAfter(Branching):
    """Base class of the placements with a norm of what a branch adds."""

    def check(self, norm: RMSNorm, scaling: Scaling) -> None:
        if scaling.depth is not None and norm.stored == "offset":
            allowed = (
                "null with norm.stored offset: depth scaling multiplies gains, not offsets from one"
            )
            raise BadInput("scaling.depth", scaling.depth, allowed)

    def params(self, name: str, norm: RMSNorm, d_model: int) -> dict[str, Any]:
        # Only the outer gain determines the size of what a branch adds.
        after = map_params(lambda p: replace(p, ends_branch=True), norm.params(d_model))
        return {f"{name}_post_norm": after}

    def leave(self, weights: Weights, name: str, norm: RMSNorm, branch: Residual) -> Residual:
        return norm.apply(weights[f"{name}_post_norm"], branch)


@dataclass(frozen=True)
class PostNorm(NormAfter):
    """Norm after each branch only: x + norm(branch(x)) (OLMo 2)."""

    kind: Literal["post"] = "post"

    def enter(self, weights: Weights, name: str, norm: RMSNorm, x: Residual) -> Residual:
        return x


@dataclass(frozen=True)
class SandwichNorm(NormAfter):
    """Norm before and after each branch: x + norm(branch(norm(x))) (Gemma 2)."""

    kind: Literal["sandwich"] = "sandwich"

    def params(self, name: str, norm: RMSNorm, d_model: int) -> dict[str, Any]:
        return {f"{name}_norm": norm.params(d_model), **super().params(name, norm, d_model)}


RESIDUALS = PartTable(
    "residual", Branching, {"pre": PreNorm, "post": PostNorm, "sandwich": SandwichNorm}
)
AnyResidual = Annotated[Branching, RESIDUALS]
