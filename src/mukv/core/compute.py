"""Settings of how a forward pass runs, as opposed to which function it computes.

A setting of None is chosen by `Compute.resolve` for the platform; `mukv describe` prints the
result. Weights and optimizer state are float32 whatever the compute type; logits, softmax, norms
and loss are computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import jax
import jax.numpy as jnp

from mukv.core.counts import require_counts
from mukv.core.params import Param, map_params

Platform = Literal["cpu", "gpu", "tpu"]
DType = Literal["float32", "bfloat16"]
CoreName = Literal["flash", "splash", "flash_decode", "fused", "plain"]
RESIDUAL = "residual"
PRODUCT = "product"
CHOICE = "choice"
"""Names of the residual stream between layers, of products with weights, and of what a cache policy
chose, for policies of rematerialisation. Choices are stored and never made again."""


@dataclass(frozen=True)
class Compute:
    """Settings of how a forward pass runs.

    dtype: type of activations and cache entries; None for float32 on a CPU and bfloat16 elsewhere
    operands: type that both operands of a product with weights are rounded to, with float32 sums;
        `dtype` if None
    unroll: whether layers are unrolled instead of scanned (faster on a CPU, slower to compile);
        None to unroll on a CPU only
    rematerialise: what the backward pass recomputes instead of storing it: nothing (false), each
        layer from the residual stream (true), all but the products with weights ("products"), or
        each layer from the residual stream, which waits in the host's memory ("offload")
    fused: whether attention avoids the tensor of logits of all pairs of tokens
    core: attention core of training and of prefill into an empty cache; None for the fastest that
        can serve
    attention_chunk: queries per chunk of the fused core; None for a size that depends on the length
    loss_chunk: tokens per row whose logits exist at once; None for 32 MiB of float32 logits per row
        on a CPU and 1 GiB per device elsewhere, but at least 128 tokens
    platform: platform that the other settings and the attention core are chosen for; None for the
        one that JAX runs on; programs for another platform can be lowered but not run
    """

    dtype: DType | None = None
    operands: DType | None = None
    unroll: bool | None = None
    rematerialise: bool | Literal["products", "offload"] = False
    fused: bool = True
    core: CoreName | None = None
    attention_chunk: int | None = None
    loss_chunk: int | None = None
    platform: Platform | None = None

    def __post_init__(self) -> None:
        require_counts(self, "attention_chunk", "loss_chunk", unit="token")

    def resolve(self, platform: Platform) -> Compute:
        """Return a copy in which every setting that depends on the platform has a value.

        platform: platform of the device, used if the field `platform` is None
        """
        on_cpu = (self.platform or platform) == "cpu"
        dtype = self.dtype or ("float32" if on_cpu else "bfloat16")
        return replace(
            self,
            dtype=dtype,
            operands=self.operands or dtype,
            unroll=on_cpu if self.unroll is None else self.unroll,
            platform=self.platform or platform,
        )

    def recomputing(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a layer's function whose backward pass recomputes what `rematerialise` says."""
        policies = jax.checkpoint_policies
        match self.rematerialise:
            case False:
                return function
            case "products":
                return jax.checkpoint(
                    function, policy=policies.save_only_these_names(PRODUCT, CHOICE)
                )
            case "offload":
                offloaded = policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[CHOICE],
                    names_which_can_be_offloaded=[RESIDUAL],
                    offload_src="device",
                    offload_dst="pinned_host",
                )
                return jax.checkpoint(function, policy=offloaded)
            case _:
                return jax.checkpoint(function, policy=policies.save_only_these_names(CHOICE))

    @property
    def type(self) -> jnp.dtype:
        """Type of activations and cache entries."""
        return jnp.dtype(self.dtype or "float32")

    def loss_tokens(self, rows: int, vocab_size: int) -> int:
        """Return the number of tokens per row whose logits exist at once.

        rows: rows of the batch on one device
        """
        # On a CPU smaller chunks only cost time; on an accelerator every chunk reads the whole
        # readout and updates its gradient.
        logits = 1 << 23 if self.platform in ("cpu", None) else (1 << 28) // rows
        return self.loss_chunk or max(128, logits // vocab_size)

    def working_copy(self, declared: Any, weights: Any) -> Any:
        """Round the weights that are multiplied to the type of operands.

        Gains, biases and routers stay float32: rounding a router's weights would send tokens to
        other experts. declared: tree of `Param` with the keys of `weights`.
        """
        operand = jnp.dtype(self.operands or "float32")

        def rounded(param: Param, weight: Any) -> Any:
            return weight.astype(operand) if param.fan_in and param.role != "router" else weight

        return map_params(rounded, declared, weights)


def settled(compute: Compute | None) -> Compute:
    """Resolve the settings of an entry point, for the platform that JAX runs on if none is named.

    Settings that are already resolved are returned unchanged. compute: None for the defaults.
    """
    platform = cast(Platform, jax.default_backend())
    return (compute or Compute()).resolve(platform)
