"""Training of learned eviction: whole rows are read with gates in place (DMS).

While gates are trained, entries fade instead of being dropped: of the logits of queries beyond the
window log(1 + exp(l)) is subtracted, where l is the relaxed decision (Gumbel-sigmoid). Without
noise, entries are dropped as the cache policy `dms` drops them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from mukv.attention import Bag, Entries
from mukv.attention.eviction import EVICTED, EVICTION, Fading, of_next, until
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float, Int
from mukv.model.passes import Asked
from mukv.model.plan import ResolvedLayer
from mukv.model.through import Through

FIELD = "attention.eviction"


@dataclass(frozen=True)
class Evicting:
    """Gates that are in place while whole rows are read.

    noise: data of a random key of each row; None for decisions without noise, which get no gradient
    target: fraction of the entries of each row that are to be evicted; None without noise
    temperature: divisor of the noisy logits; the smaller, the nearer to a decision
    """

    noise: Array | None = None
    target: Float[Array, " batch"] | None = None
    temperature: float = 0.1

    def check(self, stack: Any, tokens: int) -> None:
        """Raise BadInput if a layer has no gates, or a window as long as rows of this many
        tokens."""
        if not stack.whole:
            raise BadInput(FIELD, None, "a layer whose entries are all kept, without a window")
        for layer, _ in stack.whole:
            gates = getattr(layer.attention, EVICTION, None)
            if gates is None:
                allowed = (
                    f"gates in every layer without a window, such as {{window: 128}}: layer "
                    f"{layer.index} ({layer.attention.kind}) has none; grouped attention has them"
                )
                raise BadInput(FIELD, None, allowed)
            if gates.window >= tokens:
                allowed = f"less than the {tokens} tokens of a row, or no query is beyond it"
                raise BadInput(f"{FIELD}.window", gates.window, allowed)

    def alike(self, stack: Any, stage: int, tokens: int) -> bool:
        """Return that the repeats of a stage share one program."""
        return True

    def limited(
        self,
        layer: ResolvedLayer,
        entries: Entries,
        place: tuple[int, int],
        name: str,
        weights: Any,
        asked: Asked,
        segment: Int[Array, "batch token"] | None,
        number: Int[Array, ""] | int,
    ) -> Bag:
        """Return the entries of whole rows as queries of the same rows read them.

        place, name, weights: as in `Through.limited`; not used
        number: of the layer, which selects its noise
        """
        logits = entries.tensors[EVICTION][..., 0].astype(jnp.float32)
        window = getattr(layer.attention, EVICTION).window
        if self.noise is None:
            evicted = of_next(logits, -1.0) > 0
            return replace(entries, until=until(evicted, entries.position, window))
        noise = jax.vmap(lambda key: _logistic(key, number, logits.shape[1:]))(self.noise)
        relaxed = (logits + noise) / self.temperature
        soft = jax.nn.sigmoid(relaxed)
        # Decisions are counted; the gradient is that of the sigmoid (straight through).
        hard = soft + jax.lax.stop_gradient((relaxed > 0) - soft)
        # The gate of a document's first token decides about no entry.
        counted = asked.position > 0
        if segment is not None:
            counted &= segment > 0
        total = jnp.maximum(jnp.sum(counted, axis=1), 1) * logits.shape[1]
        share = jnp.sum(hard * counted[:, None], axis=(1, 2)) / total
        amount = of_next(jax.nn.log_sigmoid(-relaxed), 0.0)
        return Fading(entries, amount, {EVICTED: share}, window)

    def penalty(
        self, counts: Mapping[str, Float[Array, " batch"]], tokens: int
    ) -> Float[Array, " batch"] | None:
        """Return what is missing to the target in each row; 0 above it. counts: logged numbers,
        summed over rows of this many tokens"""
        if self.target is None:
            return None
        # Per row, so that it does not depend on how a batch is split over devices.
        return jnp.maximum(self.target - counts[EVICTED] / tokens, 0.0)


AnyThrough = Through | Evicting
"""What is in place while whole rows are read."""


def _logistic(key: Array, number: Int[Array, ""] | int, shape: tuple[int, ...]) -> Array:
    """Draw the difference of two Gumbel variables for each head and token of a layer."""
    own = jax.random.fold_in(jax.random.wrap_key_data(key), number)
    return jax.random.logistic(own, shape, jnp.float32)
