"""Injection by addition to the residual stream."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp

from mukv.attention import AnyAttention
from mukv.core.broadcast import with_rank
from mukv.core.linear import project
from mukv.core.norm import RMSNorm
from mukv.core.params import Param
from mukv.core.typing import Array, Float, Int, Residual
from mukv.model.concept.chunks import gathered
from mukv.model.concept.injection.base import CONCEPT, Injection, InjectionInputs, Joint, Lasting


@dataclass(frozen=True)
class ResidualInjection(Injection):
    """Addition to the residual stream: y = gain * x + W g, with encoder output x and concept g.

    g is the latest concept of the document; zero before the first.
    """

    kind: Literal["residual"] = "residual"

    def give_params(
        self, d_model: int, concept: int, attention: AnyAttention, norm: RMSNorm
    ) -> dict[str, Any]:
        dims = {f"{CONCEPT}embed": concept, "embed": d_model}
        return {"give": Param(dims, fan_in=(f"{CONCEPT}embed",))}

    def own_params(self, d_model: int, attention: AnyAttention, norm: RMSNorm) -> dict[str, Any]:
        return {"skip": Param({"embed": d_model}, role="vector", init="ones")}

    def inject(self, joint: Joint, x: Residual, inputs: InjectionInputs) -> Residual:
        outputs = jnp.concatenate([inputs.before[:, None].astype(x.dtype), inputs.outputs], axis=1)
        given = gathered(project(outputs, joint.give["give"]), inputs.chunks.number)
        return self._sum(joint, x, given * inputs.confidence().astype(x.dtype), inputs.chunks.made)

    def step(
        self,
        joint: Joint,
        cache: Lasting,
        x: Residual,
        output: Float[Array, "batch concept_embed"],
        count: Int[Array, " batch"],
    ) -> tuple[Residual, Lasting]:
        given = project(output.astype(x.dtype), joint.give["give"])[:, None]
        x = self._sum(joint, x, given, count[:, None])
        return super().step(joint, cache, x, output, count)

    def _sum(self, joint: Joint, x: Residual, given: Residual, count: Array) -> Residual:
        """Add the projected concept where the document has one."""
        skip = with_rank(joint.own["skip"].astype(x.dtype), x.ndim)
        return x * skip + jnp.where(count[..., None] > 0, given, 0)
