"""An input of each layer that depends on the token itself (Gemma 3n and Gemma 4).

A second embedding has a vector per token and layer. Each layer multiplies a projection of the
residual stream with its own vector of the token, and adds the product, projected back. The table is
large and is looked up, so that it can lie in slow memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax.numpy as jnp

from mukv.core.compute import Compute
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import look_up, project
from mukv.core.norm import RMSNorm
from mukv.core.params import WIDEST, Param, map_params
from mukv.core.partition import constrain, gather
from mukv.core.typing import Array, Float, Residual, Tokens, Weights
from mukv.model.block import ACTIVATIONS, Activation
from mukv.scaling.parameterization import Scaling

AXIS, WIDTH = "inputs", "input_width"
"""Names of the axes: the inputs of all layers in order, and the input of one layer."""
Inputs = Float[Array, "batch token layers input_width"]
"""The inputs of all layers."""
Input = Float[Array, "batch token input_width"]
"""The input of one layer."""


@dataclass(frozen=True)
class LayerInputs:
    """An input of each layer, from a second embedding and from the stream before the first layer.

    With x_0, the stream before the first layer, layer l gets the input i_l = (E[token]_l +
    norm(x_0 P_l / sqrt(d_model))) / sqrt(2). After its feed-forward part it adds
    norm((activation(x G_l) * i_l) U_l) to the stream x. The norms are those of the model, the first
    with one gain for all layers. There is no paper; the source is Gemma 4's code in transformers
    (`modeling_gemma4.py`, "Per-Layer Embeddings").

    width: width of the input of one layer
    activation: function of the projected stream
    embedding_scale: "root_width" multiplies E by the square root of `width` (Gemma); None for no
        factor
    """

    width: int = 32
    activation: Activation = "gelu"
    embedding_scale: Literal["root_width"] | None = None

    def __post_init__(self) -> None:
        require_counts(self, "width", most=WIDEST)

    def check(self, norm: RMSNorm, scaling: Scaling) -> None:
        """Raise BadInput if the norm and the scaling don't fit, as in `NormAfter.check`."""
        if scaling.depth is not None and norm.stored == "offset":
            allowed = (
                "null with norm.stored offset: depth scaling multiplies gains, not offsets from one"
            )
            raise BadInput("scaling.depth", scaling.depth, allowed)

    def params(self, vocab: int, d_model: int, layers: int, norm: RMSNorm) -> dict[str, Any]:
        """Declare the weights that make the inputs of this number of layers."""
        inputs = {AXIS: layers * self.width}
        return {
            "table": Param({"vocab": vocab, **inputs}, role="embedding"),
            "projection": Param({"embed": d_model, **inputs}, fan_in=("embed",)),
            "norm": norm.params(self.width, WIDTH),
        }

    def layer_params(self, d_model: int, norm: RMSNorm) -> dict[str, Any]:
        """Declare the weights of one layer."""
        width, inner = {"embed": d_model}, {WIDTH: self.width}
        # Only the gain determines the size of what is added.
        after = map_params(lambda p: replace(p, ends_branch=True), norm.params(d_model))
        return {
            "gate": Param(width | inner, fan_in=("embed",)),
            "up": Param(inner | width, fan_in=(WIDTH,)),
            "post_norm": after,
        }

    def make(
        self, weights: Weights, tokens: Tokens, x: Residual, norm: RMSNorm, compute: Compute
    ) -> Inputs:
        """Compute the inputs of all layers, in the type of x.

        weights: of `params`. x: residual stream before the first layer
        """
        vocab, size = weights["table"].shape
        declared = self.params(vocab, x.shape[-1], size // self.width, norm)
        for name in ("projection", "norm"):
            own = compute.working_copy(declared[name], weights[name])
            weights = {**weights, name: gather(own, declared[name])}
        shape = (*tokens.shape, -1, self.width)
        # As in `LanguageModel.embed`: the partitioner can exchange one mesh axis at a time.
        embedded = constrain(look_up(weights["table"], tokens), "batch", None, AXIS)
        embedded = embedded.astype(x.dtype)
        if self.embedding_scale is not None:
            # The root is rounded to the compute type, as that of the embedding is.
            embedded = embedded * jnp.asarray(self.width**0.5, x.dtype)
        projected = project(x, weights["projection"]) * x.shape[-1] ** -0.5
        projected = norm.apply(weights["norm"], projected.reshape(shape))
        inputs = (projected + embedded.reshape(shape)) * 2**-0.5
        return constrain(inputs, "batch", "token", None, None)

    def apply(self, weights: Weights, x: Residual, given: Input, norm: RMSNorm) -> Residual:
        """Compute what a layer adds to the residual stream.

        weights: of `layer_params`. given: input of the layer
        """
        inner = ACTIVATIONS[self.activation](project(x, weights["gate"])) * given
        return norm.apply(weights["post_norm"], project(inner, weights["up"]))
