"""Store keys with fewer channels, those on which their products with queries depend most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from mukv.attention import Queries
from mukv.cache.store import Exact, Parts, SlotArray
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Bool, Float, Int

CHANNEL = "channel"


@dataclass(frozen=True)
class ThinK(Exact):
    """Store only some channels of the keys, chosen per KV head; values stay whole (ThinK, Xu et al.
    2025).

    The importance of a channel is the mean of its squares in the last queries, over the heads of a
    group as well, times the mean of its squares in the keys. Channels are chosen when the first
    entries of a row are written, which is at its prefill, and then stay the same. Later keys are
    whole in the tail, and lose the other channels at a fold. Channels that are not stored count as
    zero in products.

    ratio: fraction of the channels that are not stored, rounded down; at least 0 and below 1
    window: number of last queries
    """

    ratio: float = 0.5
    window: int = 32

    blockwise: ClassVar[bool] = True
    in_kernels: ClassVar[bool] = False
    needs_queries: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.ratio < 1:
            raise BadInput("ratio", self.ratio, "at least 0 and below 1")
        require_counts(self, "window", most=1 << 20)

    def fitted(
        self,
        key: bool,
        tensor: SlotArray,
        there: Bool[Array, "batch #heads slot"],
        queries: Queries | None,
        added: Int[Array, " batch"],
    ) -> Parts:
        if not key:
            return {}
        width, used = tensor.shape[-1], there[..., None]
        number = jnp.maximum(jnp.sum(used, axis=2), 1)
        square = jnp.where(used, jnp.square(tensor.astype(jnp.float32)), 0.0)
        importance = jnp.sum(square, axis=2) / number
        if queries is not None:
            importance *= self._squared(queries, added)
        _, channel = jax.lax.top_k(importance, width - int(width * self.ratio))
        return {CHANNEL: jnp.sort(channel, axis=-1)[:, :, None]}

    def _squared(
        self, queries: Queries, added: Int[Array, " batch"]
    ) -> Float[Array, "batch kv_heads width"]:
        """Return the mean square of each channel of the last queries."""
        places = queries.shape[3]
        number = min(self.window, places)
        place = added[:, None] - number + jnp.arange(number)[None]
        # Where only the newest queries are kept, query i is at place i modulo their number.
        index = (jnp.maximum(place, 0) % places)[:, None, None, :, None]
        last = jnp.take_along_axis(queries, index, axis=3).astype(jnp.float32)
        there = (place >= 0)[:, None, None, :, None]
        total = jnp.sum(jnp.where(there, jnp.square(last), 0.0), axis=(2, 3))
        count = jnp.minimum(jnp.maximum(added, 1), number) * queries.shape[2]
        return total / count[:, None, None]

    def reduced(
        self, key: bool, tensor: SlotArray, fitted: Parts
    ) -> Float[Array, "batch heads slot kept"]:
        if not key:
            return tensor
        channel = fitted[CHANNEL]
        index = jnp.broadcast_to(channel, (*tensor.shape[:3], channel.shape[3]))
        return jnp.take_along_axis(tensor, index, axis=3)

    def decode(self, key: bool, parts: Parts, width: int) -> SlotArray:
        stored = parts["exact"]
        if not key:
            return stored
        same = jax.nn.one_hot(parts[CHANNEL], width, dtype=bool)
        there = jnp.any(same, axis=3)
        index = jnp.broadcast_to(jnp.argmax(same, axis=3), (*stored.shape[:3], width))
        return jnp.where(there, jnp.take_along_axis(stored, index, axis=3), 0)
