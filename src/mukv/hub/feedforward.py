"""Read and write the keys of a config.json for the feed-forward parts of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from mukv.core.errors import BadInput
from mukv.hub.settings import ACTIVATIONS, Given
from mukv.model.block import Feedforward, Gated
from mukv.model.experts import MOST_EXPERTS, Experts

WRITTEN = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())}
"""Name of an activation that is written, by our name."""
NAMES: dict[type, str] = {Gated: "gated", Experts: "experts"}
MLP = TypeVar("MLP", bound=Feedforward)


@dataclass(frozen=True)
class FeedforwardKeys:
    """Keys for the feed-forward parts. In this base class all layers have the same gated MLP.

    activation: key of the activation
    """

    activation: str = "hidden_act"

    def read(self, given: Given, layers: int) -> Sequence[Feedforward]:
        """Return the feed-forward part of each layer."""
        given.require("mlp_bias", False)
        return [self.gated(given)] * layers

    def write(self, parts: Sequence[Feedforward]) -> dict[str, Any]:
        """Return the keys that express these parts. Raises BadInput for parts that the family can't
        express.
        """
        part = alike(parts, Gated)
        return self.keys_of_gated(part)

    def gated(self, given: Given) -> Gated:
        """Read a gated MLP."""
        return Gated(
            hidden=given.whole("intermediate_size"),
            activation=given.one_of(self.activation, ACTIVATIONS),
        )

    def keys_of_gated(self, part: Gated) -> dict[str, Any]:
        """Return the keys of a gated MLP."""
        return {"intermediate_size": part.hidden, self.activation: WRITTEN[part.activation]}


@dataclass(frozen=True)
class ClampedExperts(FeedforwardKeys):
    """The same experts in all layers, with biases and clamped activations (gpt-oss)."""

    def read(self, given: Given, layers: int) -> Sequence[Feedforward]:
        given.require("swiglu_alpha", 1.702)
        part = Experts(
            **chosen(given, "num_local_experts"),
            hidden=given.whole("intermediate_size"),
            activation="quick_gelu",
            limit=given.number("swiglu_limit"),
            up_offset=1.0,
            biases=True,
        )
        return [part] * layers

    def write(self, parts: Sequence[Feedforward]) -> dict[str, Any]:
        part = alike(parts, Experts)
        require(part, activation="quick_gelu", up_offset=1.0, biases=True, shared=0)
        require(part, router="softmax", normalise=True)
        if part.limit is None:
            raise BadInput("mlp.limit", None, "a number")
        return {
            "num_local_experts": part.experts,
            "num_experts_per_tok": part.top_k,
            "intermediate_size": part.hidden,
            "swiglu_limit": part.limit,
        }


def chosen(given: Given, key: str) -> dict[str, Any]:
    """Read the number of experts, from this key, and how many of them process a token."""
    experts = given.whole(key, high=MOST_EXPERTS)
    return {"experts": experts, "top_k": given.whole("num_experts_per_tok", high=experts)}


def alike(parts: Sequence[Feedforward], kind: type[MLP]) -> MLP:
    """Return the only part of these layers. Raises BadInput if a part is of another kind, or if the
    parts differ."""
    found = {part for part in parts if isinstance(part, kind)}
    for part in parts:
        if not isinstance(part, kind):
            raise BadInput("mlp.kind", getattr(part, "kind", "?"), NAMES[kind])
    if len(found) > 1:
        raise BadInput("plan: mlp", found, "the same in all layers")
    return found.pop()


def require(part: Experts, **wanted: Any) -> None:
    """Raise BadInput unless the fields of the experts have these values, and no choice is dropped
    for want of capacity."""
    for name, value in {**wanted, "capacity": None}.items():
        if getattr(part, name) != value:
            raise BadInput(f"mlp.{name}", getattr(part, name), str(value))
