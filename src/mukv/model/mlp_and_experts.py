"""An MLP that processes every token and a mixture of experts beside it (Gemma 4 26B)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mukv.core.errors import BadInput
from mukv.core.norm import RMSNorm
from mukv.core.typing import Array, Bool, Residual, Weights
from mukv.model.auxiliary import Auxiliary
from mukv.model.block import Feedforward, Gated
from mukv.model.experts import Experts

NORMS = ("mlp_post", "experts", "experts_post", "router")
"""Norms of the output of the MLP, the input and the output of the experts, and the input of the
router."""


@dataclass(frozen=True)
class MLPAndExperts(Feedforward):
    """A gated MLP and experts beside it, each with a norm of its own output.

    With the residual stream x and h, the input of the branch, it computes norm(mlp(h)) +
    norm(experts(norm(x))). The router reads norm(x) too, with a gain of its own. There is no paper;
    the source is Gemma 4's code in transformers (`modeling_gemma4.py`, `Gemma4TextDecoderLayer`).

    mlp: gated MLP, whose input is that of the branch
    experts: experts beside it, whose input is the normed residual stream
    norm: norm of the experts' input and of both outputs
    router_scale: factor of what the router reads, beside the gain (Gemma 4: 1 / sqrt(d_model))
    """

    kind: Literal["mlp_and_experts"] = "mlp_and_experts"
    mlp: Gated = field(default_factory=Gated)
    experts: Experts = field(default_factory=Experts)
    norm: RMSNorm = field(default_factory=RMSNorm)
    router_scale: float = 1.0

    def __post_init__(self) -> None:
        if self.router_scale <= 0:
            raise BadInput("router_scale", self.router_scale, "greater than 0")

    def params(self, d_model: int) -> dict[str, Any]:
        norms = {f"{name}_norm": self.norm.params(d_model) for name in NORMS}
        parts = {"mlp": self.mlp.params(d_model), "experts": self.experts.params(d_model)}
        return {**parts, **norms}

    def apply(
        self, weights: Weights, x: Residual, counted: Bool[Array, "batch token"] | None = None
    ) -> tuple[Residual, Auxiliary | None]:
        return self.branch(weights, x, x, counted)

    def branch(
        self,
        weights: Weights,
        x: Residual,
        stream: Residual,
        counted: Bool[Array, "batch token"] | None = None,
    ) -> tuple[Residual, Auxiliary | None]:
        def normed(name: str, x: Residual) -> Residual:
            return self.norm.apply(weights[f"{name}_norm"], x)

        dense = normed("mlp_post", self.mlp.apply(weights["mlp"], x)[0])
        asked = normed("router", stream) * self.router_scale
        given = weights["experts"], normed("experts", stream), asked
        mixed, reported = self.experts.mix(*given, counted)
        return dense + normed("experts_post", mixed), reported
