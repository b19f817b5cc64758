"""The base class of layers with a gated delta rule: a state of constant size in place of entries.

Queries, keys and values pass through short causal convolutions and silu; queries and keys get unit
length. The state is read after each token has written to it, and the result is normed per head,
gated and projected. There is no position encoding: decay and convolutions depend on the order of
tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from mukv.attention.convolution import causal_convolution, newest
from mukv.attention.delta_rule import CHUNK, DeltaRows, delta_rule
from mukv.attention.entries import Bag
from mukv.attention.mask import Mask
from mukv.attention.mixer import (
    DIRECT,
    Carried,
    EntryStore,
    Mixer,
    Reported,
    StateStore,
    Tensors,
    Written,
)
from mukv.core.compute import Compute
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.linear import project
from mukv.core.norm import RMSNorm
from mukv.core.params import Param
from mukv.core.partition import by_shard, constrain
from mukv.core.typing import Array, Bool, Float, Int, Residual, Weights

MEMORY, RECENT = "memory", "recent"
"""Names of the stores: state of the delta rule; newest inputs of the convolutions."""
FLOAT32 = jnp.dtype("float32")


@dataclass(frozen=True)
class DeltaLayer(Mixer):
    """Base class of layers with a gated delta rule.

    heads: number of states, each with a value head
    head_dim: width of a key and of a query
    taps: tokens that the convolutions of queries, keys and values span, the newest one included
    norm: norm of the vector that a head reads from its state
    """

    heads: int = 4
    head_dim: int = 32
    taps: int = 4
    norm: RMSNorm = field(default_factory=RMSNorm)

    sizes: ClassVar[tuple[str, ...]] = ("heads", "head_dim")
    grows: ClassVar[tuple[str, ...]] = ("heads",)

    def __post_init__(self) -> None:
        require_counts(self, *self.sizes, most=1 << 16)
        require_counts(self, "taps", most=1 << 10, unit="token")

    # Methods of a variant

    @property
    def query_heads(self) -> int:
        """Number of query and of key heads; each serves heads / query_heads states."""
        return self.heads

    @property
    def value_dim(self) -> int:
        """Width of a value, and of the vector that a query reads from a state."""
        return self.head_dim

    def decay(self, weights: Weights, x: Residual) -> Float[Array, "batch token heads decay_dim"]:
        """Return the float32 log decay of each token, for each head or for each channel of a key.

        weights: weights for writing
        """
        raise NotImplementedError

    def strength(self, weights: Weights, x: Residual) -> Float[Array, "batch token heads"]:
        """Return beta of each token, the fraction of (value - value that its key reads) that is
        written, float32.

        weights: weights for writing
        """
        return jax.nn.sigmoid(project(x, weights["beta"], out=FLOAT32))

    def gate(self, weights: Weights, x: Residual) -> Float[Array, "batch token heads value_dim"]:
        """Return the float32 gate that multiplies the vector that each head reads.

        weights: weights for reading
        """
        raise NotImplementedError

    # Weights

    @property
    def widths(self) -> dict[str, dict[str, int]]:
        """Head axes of queries, keys and values, by name."""
        key = {"delta_key_heads": self.query_heads, "delta_dim": self.head_dim}
        value = {"delta_heads": self.heads, "delta_value_dim": self.value_dim}
        return {"query": key, "key": key, "value": value}

    def write_params(self, d_model: int) -> dict[str, Any]:
        embed, heads = {"embed": d_model}, {"delta_heads": self.heads}
        widths, taps = self.widths, {"taps": self.taps}
        return {
            **{name: Param(embed | dims, fan_in=("embed",)) for name, dims in widths.items()},
            "convolution": {
                name: Param(taps | dims, role="vector", fan_in=("taps",))
                for name, dims in widths.items()
            },
            "beta": Param(embed | heads, fan_in=("embed",)),
            "rate": Param(heads, role="vector", init="decay_rates"),
        }

    def read_params(self, d_model: int) -> dict[str, Any]:
        dims = {**self.widths["value"], "embed": d_model}
        return {
            "norm": self.norm.params(self.value_dim, "delta_value_dim"),
            "output": Param(dims, fan_in=tuple(self.widths["value"]), ends_branch=True),
        }

    # Writing and reading

    def stores(self) -> Mapping[str, EntryStore | StateStore]:
        recent = {name: (self.taps - 1, *dims.values()) for name, dims in self.widths.items()}
        state = {"state": (self.heads, self.head_dim, self.value_dim)}
        return {MEMORY: StateStore(state), RECENT: StateStore(recent)}

    def write(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None = None,
    ) -> Written:
        """Compute the vectors that each token reads from the state, and the new states.

        The vectors are returned under DIRECT. A token at position 0 starts from a state of zeros.
        """
        states = {RECENT: {}} if memory is None else memory.states
        made, recent = self._convolved(weights, x, position, memory)
        share = self.heads // self.query_heads
        rows = DeltaRows(
            query=jnp.repeat(_unit(made["query"]) * self.head_dim**-0.5, share, axis=2),
            key=jnp.repeat(_unit(made["key"]), share, axis=2),
            value=made["value"],
            decay=self.decay(weights, x),
            beta=self.strength(weights, x),
        )
        if memory is None:
            (zeros,) = self.states[MEMORY].zeros(len(x)).values()
            read, _ = _by_head(rows, position == 0, zeros)
            return {DIRECT: {"read": read}}
        added = jnp.arange(x.shape[1])[None] < memory.added[:, None]
        rows = rows._replace(
            decay=jnp.where(added[..., None, None], rows.decay, 0),
            beta=jnp.where(added[..., None], rows.beta, 0),
        )
        read, state = _by_head(rows, position == 0, states[MEMORY]["state"])
        return {DIRECT: {"read": read}, MEMORY: {"state": state}, RECENT: recent}

    def _convolved(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        memory: Carried | None,
    ) -> tuple[Tensors, Tensors]:
        """Project and convolve queries, keys and values; return them and the new states."""
        made, recent = {}, {}
        for name in self.widths:
            raw, taps = project(x, weights[name]), weights["convolution"][name]
            earlier = None if memory is None else memory.states[RECENT][name]
            made[name] = jax.nn.silu(causal_convolution(raw, taps, position, earlier))
            if memory is not None:
                recent[name] = newest(raw, self.taps, memory.states[RECENT][name], memory.added)
        return made, recent

    def read(
        self,
        weights: Weights,
        x: Residual,
        position: Int[Array, "batch token"],
        parts: Sequence[Bag],
        mask: Mask,
        compute: Compute,
        direct: Tensors | None = None,
    ) -> tuple[Residual, Reported]:
        """Norm, gate and project the vectors that the heads have read.

        direct: arrays that `write` returned under DIRECT for these tokens
        """
        assert direct is not None
        heads = self.norm.apply(weights["norm"], direct["read"]) * self.gate(weights, x)
        return project(heads.astype(x.dtype), weights["output"], contracted=2), None

    def token_flops(self) -> int:
        """Return the floating-point operations per token of the matrix products within a chunk of
        `CHUNK` tokens and with the state."""
        key, value = self.head_dim, self.value_dim
        return self.heads * (6 * key * value + CHUNK * (5 * key + 3 * value))


def check_key_heads(heads: int, key_heads: int | None) -> None:
    """Raise BadInput unless key_heads divides heads."""
    if key_heads is not None and heads % key_heads:
        raise BadInput("key_heads", key_heads, f"a number that divides heads ({heads}), or null")


def decayed(
    weights: Weights, step: Float[Array, "batch token heads decay_dim"]
) -> Float[Array, "batch token heads decay_dim"]:
    """Return the log decay -exp(rate) softplus(step). weights: with the `rate` of each head."""
    rate = jnp.exp(weights["rate"].astype(jnp.float32))[None, None, :, None]
    return -rate * jax.nn.softplus(step)


def _by_head(
    rows: DeltaRows,
    first: Bool[Array, "batch token"],
    state: Float[Array, "batch heads key_dim value_dim"],
) -> tuple[
    Float[Array, "batch token heads value_dim"], Float[Array, "batch heads key_dim value_dim"]
]:
    """Compute `delta_rule`, on a mesh for the rows and heads of each device.

    The axis `context` splits heads here, as `tensor` does, so that a device needs no state of
    another one: it exchanges its tokens of all heads for all tokens of its heads (Ulysses,
    2309.14509).
    """
    by_token, by_row = ("batch", "row", "state_heads"), ("batch", "state_heads")
    names = (*(by_token for _ in rows), ("batch",), by_row)

    def own(*given: Array) -> tuple[Array, Array]:
        *mine, first, state = given
        return delta_rule(DeltaRows(*mine), first, state)

    read, state = by_shard(own, names, (by_token, by_row))(*rows, first, state)
    return constrain(read, "batch", "token", "delta_heads", None), state


def _unit(x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
    """Divide by the length: x / sqrt(sum x^2 + 1e-6)."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)
