"""Training of the gates of learned eviction, with all other weights frozen (DMS).

The model with gates learns to predict what it predicts without them, while the fraction of evicted
entries has to reach a target that rises over the steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from mukv.attention.eviction import EVICTION
from mukv.core.counts import require_counts
from mukv.core.errors import BadInput
from mukv.core.params import named, nested
from mukv.core.typing import Array, Float
from mukv.model.base import LanguageModel
from mukv.model.evicting import AnyThrough, Evicting
from mukv.model.loss import Teacher
from mukv.train.adapted import WHERE, Adapting, structure

NOISE, TARGET = "noise", "target"
"""Arrays of a batch: data of a random key and target of each row."""
STREAM = 0x0E71C7
"""Number that separates the noise from other uses of the seed."""


@dataclass(frozen=True)
class EvictionGates(Adapting):
    """Gates of learned eviction (DMS, Łańcucki et al. 2025): `model.attention.eviction` gives the
    model of `train.start` one gate per token and KV head, and only these are trained.

    Training minimises KL(model without gates || model with gates), or with `train.teacher` the
    objective of distillation, plus max(0, target - fraction of evicted entries) per row. In the
    forward pass entries fade by log sigmoid(-l) for queries beyond the window, where l = (logit +
    difference of two Gumbel noises) / temperature. Validation evicts without noise.

    ratio: compression ratio r at the end of the ramp; the target is 1 - 1 / r
    ramp: number of updates over which the ratio rises linearly from 1; None for all
    temperature: divisor of the noisy logits
    """

    kind: Literal["eviction"] = "eviction"
    ratio: float = 4.0
    ramp: int | None = None
    temperature: float = 0.1

    def __post_init__(self) -> None:
        require_counts(self, "ramp")
        if self.ratio <= 1:
            raise BadInput("ratio", self.ratio, "greater than 1: all entries per kept entry")
        if self.temperature <= 0:
            raise BadInput("temperature", self.temperature, "greater than 0")

    def check(self, model: LanguageModel, training: Any) -> None:
        if training.policy is not None:
            allowed = f"null with {WHERE} of kind {self.kind}: the gates evict already"
            raise BadInput("train.policy", training.policy, allowed)
        for _, length in training.sizes:
            try:
                model.check_through(Evicting(), length)
            except BadInput as error:
                raise BadInput(f"model.{error.where}", error.given, error.allowed) from None
        super().check(model, training)

    def params(self, declared: Any) -> dict[str, Any]:
        gates = {name: p for name, p in named(declared).items() if p.tag == EVICTION}
        if not gates:
            allowed = "gates, such as {window: 128}, for train.adapter of kind eviction"
            raise BadInput("model.attention.eviction", None, allowed)
        return nested(gates)

    def attached(self, model: LanguageModel, base: Any, own: Any) -> Any:
        gates = model.scaling.scale(self.params(model.params()), own, len(model.layers))
        return _added(model, model.scaled(base), gates)

    def merged(self, model: LanguageModel, base: Any, own: Any) -> Any:
        return _added(model, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), base), own)

    def target(self, step: Array, steps: int) -> Float[Array, ""]:
        """Return the fraction of entries that update number `step`, from 0, asks for."""
        share = jnp.minimum((step + 1) / (self.ramp or steps), 1.0)
        return 1 - 1 / (1 + (self.ratio - 1) * share)

    def drawn(self, batch: Any, training: Any, step: Array) -> Any:
        rows = jnp.arange(len(batch["tokens"]))
        key = jax.random.key(training.seed)
        key = jax.random.fold_in(jax.random.fold_in(key, STREAM), step)
        noise = jax.vmap(lambda row: jax.random.key_data(jax.random.fold_in(key, row)))(rows)
        target = jnp.full(rows.shape, self.target(step, training.steps))
        return {**batch, NOISE: noise, TARGET: target}

    def reading(self, batch: Any, through: AnyThrough | None) -> AnyThrough | None:
        return Evicting(batch.get(NOISE), batch.get(TARGET), self.temperature)

    def teacher(
        self, batch: Any, model: LanguageModel, weights: Any, given: Teacher | None
    ) -> Teacher | None:
        if given is not None or NOISE not in batch:
            return given
        return Teacher(model, jax.lax.stop_gradient(weights), share=1.0, temperature=1.0)


def _added(model: LanguageModel, weights: Any, gates: Any) -> Any:
    """Return the weights of a model with these added to its gates."""
    whole = named(weights)
    for name, own in named(gates).items():
        whole[name] = whole[name] + own
    declared = model.params()
    return structure(declared).unflatten(whole[name] for name in named(declared))
