"""Training through a cache policy: whole rows are read as if in blocks, with the policy in between.

A layer computes entries and queries of a whole row at once. The policy then chooses block by block
what it keeps, and its choices become a mask (`mukv.cache.dropped`). Each query reads what it would
read in decoding with a fold after each block. The choices get no gradient; keys, values and queries
do.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mukv.attention import Entries
from mukv.cache import Policy, Reader
from mukv.cache.dropped import Blocks, last_positions
from mukv.cache.select import All
from mukv.cache.store import Exact
from mukv.core.compute import CHOICE
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.tap import tap
from mukv.core.typing import Array, Int
from mukv.model.passes import Asked
from mukv.model.plan import ResolvedLayer
from mukv.model.policy_check import check_policy

FITS = "snapkv:0.25"


@dataclass(frozen=True)
class Through:
    """A policy that is in place while whole rows are read.

    policy: which entries are kept
    tail: tokens between two choices, as in the tail of a cache

    Raises BadInput for a policy whose reads can't be differentiated.
    """

    policy: Policy
    tail: int = 64

    def __post_init__(self) -> None:
        require_counts(self, "tail")
        policy, allowed = self.policy, None
        if not isinstance(policy.store, Exact):
            allowed = "a policy that stores entries exactly: rounding has no gradient"
        elif not isinstance(policy.select, All):
            allowed = "a policy that chooses what is kept, not what each query reads"
        elif policy.keep.replays:
            allowed = "a policy that reads the text once"
        elif policy.keep.limits:
            allowed = "a policy without gates of the model, which train.adapter trains"
        elif policy.keep.calibrated:
            allowed = "a policy that is not calibrated"
        elif not policy.keep.evicts:
            allowed = "a policy that drops entries, or null"
        elif policy.keep.merge.changes:
            allowed = "a policy without merge: what is kept is a mask over the entries of a row"
        elif policy.keep.when.holds:
            allowed = "a policy without hold: a row has no prompt after which all is kept"
        if allowed:
            raise BadInput("policy", str(policy), f"{allowed}, such as {FITS}")

    def check(self, stack: Any, tokens: int) -> None:
        """Raise BadInput, with the reason, for a policy that does not fit the layers of a stack, or
        whose budget is too small for rows of this many tokens. Nothing is allocated.
        """
        policy = self.policy
        check_policy(stack, policy)
        for place, (layer, name) in enumerate(stack.whole):
            if layer.bags[name].every > 1:
                allowed = (
                    f"null: layer {layer.index} has one entry per {layer.bags[name].every} tokens"
                )
                raise BadInput("policy", str(policy), allowed)
            sizes = stack.d_model, 1, tokens, jnp.dtype("float32"), (place, len(stack.whole))
            jax.eval_shape(partial(policy.body, layer.softmax, *sizes, bag=name))

    def alike(self, stack: Any, stage: int, tokens: int) -> bool:
        """Return whether the repeats of a stage have the same policy, so that they share one
        program. tokens: of a row"""
        keep, found = self.policy.keep, {}
        for place, (layer, name) in enumerate(stack.whole):
            if layer.stage == stage:
                own = keep.of_layer(place, len(stack.whole), tokens)
                found.setdefault((layer.slot, name), set()).add(own)
        return all(len(policies) == 1 for policies in found.values())

    def penalty(self, counts: Any, tokens: int) -> None:
        """Return that a policy adds no penalty to the objective."""
        return

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
    ) -> Entries:
        """Return the entries of whole rows with the last query that may see each of them.

        place: index of the layer among those with a policy, and their number
        name: name of the store that holds the entries
        weights: of the layer, for reading
        asked: computes the queries
        number: of the layer; not used
        """
        batch, tokens = asked.position.shape
        sizes = asked.x.shape[-1], batch, tokens, asked.x.dtype
        body = self.policy.body(layer.softmax, *sizes, place, bag=name)
        queries = asked() if body.needs_queries else None
        rows = Blocks(entries.tensors, queries, asked.position, segment)
        reader = Reader(layer.softmax, jax.lax.stop_gradient(weights))
        until = last_positions(body, self.tail, reader, rows)
        if until is None:
            return entries
        until = tap("until", checkpoint_name(until, CHOICE))
        return replace(entries, until=until)
