"""Embedding of tokens, and readout of logits, which may have the same weights."""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mukv.core.compute import Compute, settled
from mukv.core.linear import look_up, project
from mukv.core.norm import RMSNorm
from mukv.core.params import Param
from mukv.core.partition import constrain, constrain_stream, gather
from mukv.core.tap import capturing, tap
from mukv.core.typing import Array, Float, Int, Residual, Tokens, Weights
from mukv.scaling.parameterization import Scaling


class Embeddings:
    """Methods of a language model between token ids, residual stream and logits.

    The attributes are fields of `LanguageModel`.
    """

    vocab_size: int
    d_model: int
    norm: RMSNorm
    embedding_scale: Literal["root_width"] | None
    readout: Literal["linear", "tied"]
    logit_softcap: float | None
    scaling: Scaling

    def outer_params(self) -> dict[str, Any]:
        """Declare the weights of the embedding, of the norm after the last layer and of the
        readout."""
        width, vocab = {"embed": self.d_model}, {"vocab": self.vocab_size}
        tied = self.readout == "tied"
        # A tied embedding is also contracted over its width, which decides its size.
        embedding = Param(vocab | width, role="embedding", fan_in=("embed",) if tied else ())
        declared = {"embedding": embedding, "final_norm": self.norm.params(self.d_model)}
        if not tied:
            declared["readout"] = Param(
                width | vocab, role="readout", fan_in=("embed",), tag="readout"
            )
        return declared

    @property
    def readout_name(self) -> str:
        """Name of the weight that makes logits."""
        return "embedding" if self.readout == "tied" else "readout"

    def embed(self, weights: Weights, tokens: Tokens, compute: Compute) -> Residual:
        """Look up the embeddings of tokens, in the compute type."""
        # The partitioner can exchange one mesh axis at a time; for two it would gather everything.
        x = constrain(look_up(weights["embedding"], tokens), "batch", None, "embed")
        x = x.astype(compute.type)
        if self.embedding_scale is not None:
            # The base width is used, since initialisation and multipliers account for the ratio of
            # the model's width to it. The root is rounded to the compute type as in Gemma.
            width = (self.scaling.base or {}).get("embed", self.d_model)
            x = x * jnp.asarray(width**0.5, x.dtype)
        return tap("embedding", constrain_stream(x, compute.platform))

    def normed(self, weights: Weights, x: Residual) -> Residual:
        """Apply the norm after the last layer."""
        return self.norm.apply(weights["final_norm"], x)

    def logits(
        self, weights: Weights, hidden: Residual, compute: Compute | None = None
    ) -> Float[Array, "batch token vocab"]:
        """Compute the float32 logits of the next token from the output of `hidden`."""
        compute = settled(compute)
        table = weights[self.readout_name]
        if self.readout == "tied":
            hidden = hidden * self.scaling.tied_factor(self.outer_params()["embedding"])
            table = table.T
        operand = compute.operands or hidden.dtype
        out = project(hidden, table.astype(operand), out=jnp.dtype("float32"))
        if self.logit_softcap is not None:
            out = self.logit_softcap * jnp.tanh(out / self.logit_softcap)
        return tap("logits", constrain(out, "batch", "token", "vocab"))

    def gathered_readout(self, weights: Weights, compute: Compute) -> Weights:
        """Return the weight that makes logits, by its name, rounded and gathered over `data`.

        A loop that calls `logits` would otherwise gather the weight in every iteration. It is
        rounded to the type of operands before it is gathered, which halves the traffic, and then
        converted to float32, so that the gradients of the iterations are summed in float32.
        """
        name = self.readout_name
        table = weights[name].astype(compute.operands or jnp.float32)
        return {name: gather(table, self.outer_params()[name]).astype(jnp.float32)}

    def read_out(
        self,
        weights: Weights,
        x: Residual,
        compute: Compute,
        last: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch read vocab"]:
        """Compute float32 logits from `x`, the residual stream after the last layer: of all tokens,
        or of index `last` of each row. One program, so that a tied embedding is not transposed.
        """
        x = x if last is None else jnp.take_along_axis(x, last[:, None, None], axis=1)
        if capturing():
            return self.logits(weights, self.normed(weights, x), compute)
        own = {name: weights[name] for name in ("final_norm", self.readout_name)}
        return _read_out(self, compute, own, x)


@partial(jax.jit, static_argnums=(0, 1))
def _read_out(model: Embeddings, compute: Compute, weights: Weights, x: Residual) -> Array:
    return model.logits(weights, model.normed(weights, x), compute)
