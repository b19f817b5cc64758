"""Short causal convolutions over tokens, one filter per channel, with a state for decoding."""

from __future__ import annotations

import jax.numpy as jnp

from mukv.core.typing import Array, Float, Int


def causal_convolution(
    x: Float[Array, "batch token heads width"],
    taps: Float[Array, "taps heads width"],
    position: Int[Array, "batch token"],
    earlier: Float[Array, "batch earlier heads width"] | None = None,
) -> Float[Array, "batch token heads width"]:
    """Compute sum_j taps[j] x[t - (K - 1) + j] for K taps, in float32.

    position: of each token in its document; tokens before the document's first count as zero
    earlier: the K - 1 tokens before the given ones; None for zeros
    """
    count, length = taps.shape[0], x.shape[1]
    wide = preceded(x, count, earlier)
    place = position[..., None, None]
    found = jnp.zeros(x.shape, jnp.float32)
    for tap, weight in enumerate(taps.astype(jnp.float32)):
        back = count - 1 - tap
        shifted = wide[:, tap : tap + length] * weight[None, None]
        found = found + (shifted if back == 0 else jnp.where(place >= back, shifted, 0))
    return found


def newest(
    x: Float[Array, "batch token heads width"],
    count: int,
    earlier: Float[Array, "batch earlier heads width"],
    added: Int[Array, " batch"],
) -> Float[Array, "batch earlier heads width"]:
    """Return the state of a convolution with `count` taps after the first `added` of the tokens.

    earlier: the state before them
    """
    index = added[:, None] + jnp.arange(count - 1)[None]
    return jnp.take_along_axis(preceded(x, count, earlier), index[..., None, None], axis=1)


def preceded(
    x: Float[Array, "batch token heads width"],
    count: int,
    earlier: Float[Array, "batch earlier heads width"] | None,
) -> Float[Array, "batch more heads width"]:
    """Put the count - 1 tokens before x in front of it, in float32; zeros if they are None."""
    if earlier is None:
        earlier = jnp.zeros((x.shape[0], count - 1, *x.shape[2:]))
    return jnp.concatenate([earlier, x.astype(jnp.float32)], axis=1)
