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
        # transformers takes the other name as well, and before this one.
        count = "num_experts" if "num_experts" in given.mapping else "num_local_experts"
        part = Experts(
            **chosen(given, count, least=2),  # a single weight would always be one
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


@dataclass(frozen=True)
class SparseExperts(FeedforwardKeys):
    """Experts with the names of Qwen, in all layers but those of `mlp_only_layers`, and in one of
    every `decoder_sparse_step` layers; the others have a gated MLP.

    shared: whether the experts have a gated shared expert (Qwen3-Next)
    other_count: another key of the number of experts, which counts before `num_experts`
    """

    shared: bool = False
    other_count: str | None = None

    def read(self, given: Given, layers: int) -> Sequence[Feedforward]:
        step = given.whole("decoder_sparse_step")
        dense = given.items("mlp_only_layers") or []
        for number in dense:
            if type(number) is not int or not 0 <= number < layers:
                allowed = f"numbers of layers, 0 to {layers - 1}"
                raise BadInput(f"{given.where}: mlp_only_layers", dense, allowed)
        sparse = [layer not in dense and (layer + 1) % step == 0 for layer in range(layers)]
        parts: dict[bool, Feedforward] = {
            here: self.experts(given) if here else self.gated(given) for here in set(sparse)
        }
        return [parts[here] for here in sparse]

    def experts(self, given: Given) -> Experts:
        """Read the experts."""
        hidden, shared = given.whole("moe_intermediate_size"), 0
        if self.shared:
            width = given.whole("shared_expert_intermediate_size")
            shared, rest = divmod(width, hidden)
            if rest:
                allowed = f"a multiple of moe_intermediate_size ({hidden})"
                raise BadInput(f"{given.where}: shared_expert_intermediate_size", width, allowed)
        other = self.other_count
        number = chosen(given, other if other and other in given.mapping else "num_experts")
        normalise = given.flag("norm_topk_prob")
        if normalise and number["top_k"] == 1:
            allowed = "false with num_experts_per_tok 1, whose only weight would always be one"
            raise BadInput(f"{given.where}: norm_topk_prob", True, allowed)
        return Experts(
            **number,
            hidden=hidden,
            shared=shared,
            shared_gate=self.shared,
            activation=given.one_of(self.activation, ACTIVATIONS),
            normalise=normalise,
        )

    def write(self, parts: Sequence[Feedforward]) -> dict[str, Any]:
        dense = [number for number, part in enumerate(parts) if isinstance(part, Gated)]
        keys: dict[str, Any] = {"decoder_sparse_step": 1, "mlp_only_layers": dense}
        if dense:
            keys |= self.keys_of_gated(alike([parts[number] for number in dense], Gated))
        if len(dense) == len(parts):
            return keys
        part = alike([part for part in parts if not isinstance(part, Gated)], Experts)
        require(part, router="softmax", limit=None, up_offset=0.0, biases=False)
        require(part, shared_gate=self.shared)
        written = WRITTEN[part.activation]
        if keys.setdefault(self.activation, written) != written:
            raise BadInput("plan: mlp.activation", part.activation, "one in all layers")
        if self.shared:
            keys["shared_expert_intermediate_size"] = part.shared * part.hidden
        else:
            require(part, shared=0)
        return keys | {
            "num_experts": part.experts,
            "num_experts_per_tok": part.top_k,
            "moe_intermediate_size": part.hidden,
            "norm_topk_prob": part.normalise,
        }


def chosen(given: Given, key: str, least: int = 1) -> dict[str, Any]:
    """Read the number of experts, from this key, and how many of them process a token, at least
    `least`."""
    experts = given.whole(key, low=least, high=MOST_EXPERTS)
    top_k = given.whole("num_experts_per_tok", low=least, high=experts)
    return {"experts": experts, "top_k": top_k}


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
    """Raise BadInput unless the fields of the experts have these values, no choice is dropped for
    want of capacity, and those that only one family has are at their defaults if not given."""
    usual = {"capacity": None, "scale": 1.0, "groups": 1, "top_groups": 1, "choice_bias": False}
    usual["expert_scale"] = False
    if part.groups > 1:
        usual["group_best"] = 2
    for name, value in (usual | wanted).items():
        if getattr(part, name) != value:
            raise BadInput(f"mlp.{name}", getattr(part, name), str(value))
