"""Continue a text that several policies share: their caches from one prefill, tokens in blocks.

`mukv compress` compares policies with these methods; a model without its own gets the default.
Training through a policy asks `check_through` first.
"""

from __future__ import annotations

from typing import Any

import jax

from mukv.core.compute import Compute
from mukv.core.errors import BadInput
from mukv.core.typing import Array, Float, Tokens, Weights
from mukv.model.evicting import AnyThrough, Evicting
from mukv.model.stack import Stack


class Continued:
    """Methods of a language model that concern cache policies."""

    @property
    def policy_stack(self) -> Stack:
        """The stack whose layers a cache policy applies to."""
        raise NotImplementedError

    def check_through(self, through: AnyThrough, tokens: int) -> None:
        """Raise BadInput, with the reason, for a policy that can't be in place in training. tokens:
        of a row
        """
        if isinstance(through, Evicting):
            allowed = "decoder, for train.adapter of kind eviction"
            raise BadInput("kind", getattr(self, "kind", None), allowed)
        allowed = "null: only decoders are trained through a policy"
        raise BadInput("policy", str(through.policy), allowed)

    def compressed(self, weights: Weights, recorded: Any, empty: Any) -> Any:
        """Return the cache that `prefill` makes under a policy, without reading the text again.

        weights: scaled and unstacked. recorded: cache of the text under `mukv.cache.RECORD`. empty:
        cache under the policy, with the sizes of `recorded`.
        """
        raise NotImplementedError

    def read_block(
        self,
        weights: Weights,
        cache: Any,
        tokens: Tokens,
        compute: Compute | None = None,
        joins: bool = True,
    ) -> tuple[Float[Array, "batch token vocab"], Any]:
        """Read as many known tokens as fit in the tail, as that many calls of `step` and a `fold`.

        weights: scaled and unstacked. cache: cache with an empty tail. joins: whether the entries
        of these tokens join the bodies; if not, the cache is returned unchanged.

        Returns the float32 logits after each token, and the updated cache.
        """
        model: Any = self
        frozen, live = cache.split()

        def step(live: Any, token: Array) -> tuple[Any, Array]:
            cache = model.cache_class.join(frozen, live)
            logits, cache = model.step(weights, cache, token, compute)
            return cache.split()[1], logits

        live, logits = jax.lax.scan(step, live, tokens.T)
        if joins:
            cache = model.fold(weights, model.cache_class.join(frozen, live))
        return logits.swapaxes(0, 1), cache
