"""How a forward pass is carried out, as opposed to what it computes.

`None` leaves the choice to the platform; `resolve` makes it, and `mukv describe` prints it.
Weights and optimizer state are float32 whatever the compute type; logits, softmax, norms and
loss are computed in float32.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from mukv.core.counts import require_counts
from mukv.core.params import Param, map_params

Platform = Literal["cpu", "gpu", "tpu"]


@dataclass(frozen=True)
class Compute:
    """dtype: type of activations.
    operands: type that products with weights round their operands to; sums are float32.
    unroll: layers one by one rather than scanned (faster on a CPU, slower to compile).
    rematerialise: keep only the residual stream between layers for the backward pass.
    fused: attention without a token x token tensor.
    attention_chunk: queries that the fused core takes at once.
    loss_chunk: tokens per row whose logits exist at once.
    platform: that the other choices are made for; the one that JAX runs on if None.
    """

    dtype: Literal["float32", "bfloat16"] | None = None
    operands: Literal["float32", "bfloat16"] | None = None
    unroll: bool | None = None
    rematerialise: bool = False
    fused: bool = True
    attention_chunk: int | None = None
    loss_chunk: int | None = None
    platform: Platform | None = None

    def __post_init__(self) -> None:
        require_counts(self, "attention_chunk", "loss_chunk", unit="token")

    def resolve(self, vocab_size: int, platform: Platform) -> Compute:
        """The same with nothing left open. platform: that of the device, where none is named."""
        on_cpu = (self.platform or platform) == "cpu"
        dtype = self.dtype or ("float32" if on_cpu else "bfloat16")
        return replace(
            self,
            dtype=dtype,
            operands=self.operands or dtype,
            unroll=on_cpu if self.unroll is None else self.unroll,
            # At most 32 MiB of float32 logits per row; smaller chunks only cost time.
            loss_chunk=self.loss_chunk or max(128, (1 << 23) // vocab_size),
            platform=self.platform or platform,
        )

    @property
    def type(self) -> jnp.dtype:
        """Of activations and cache entries."""
        return jnp.dtype(self.dtype or "float32")

    def working_copy(self, declared: Any, weights: Any) -> Any:
        """The weights as the forward pass multiplies with them; gains and routers stay as they
        are: rounding a router's scores would send tokens to other experts."""
        operand = jnp.dtype(self.operands or "float32")

        def rounded(param: Param, weight: Any) -> Any:
            return weight.astype(operand) if param.fan_in and param.role != "router" else weight

        return map_params(rounded, declared, weights)


def settled(compute: Compute | None, vocab_size: int) -> Compute:
    """Resolve the settings of an entry point, for the platform that JAX runs on if none is named.

    Settings that are resolved already stay as they are.
    """
    platform = cast(Platform, jax.default_backend())
    return (compute or Compute()).resolve(vocab_size, platform)
