"""DeepSeek-V2, V2-Lite and V2-Coder (DeepSeek-AI 2024, 2405.04434).

They have the latent attention and the tensors of DeepSeek-V3. Experts are chosen by softmax scores,
which are not normalised, from groups that are compared by their best score, or without groups.
Rotated pairs are always interleaved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mukv.hub.deepseek import DEFAULTS, RULES, GroupedExperts, LatentFamily, free, read_groups
from mukv.hub.feedforward import require
from mukv.hub.settings import Given
from mukv.model.block import Feedforward
from mukv.model.experts import Experts

METHODS = {"greedy": False, "group_limited_greedy": True}
"""Whether a token's experts are chosen from groups, by the value of `topk_method`."""


@dataclass(frozen=True)
class SoftmaxExperts(GroupedExperts):
    """A gated MLP in the first `first_k_dense_replace` layers, and the same experts in the others,
    chosen by softmax scores."""

    def read(self, given: Given, layers: int) -> Sequence[Feedforward]:
        given.require("mlp_bias", False)
        return super().read(given, layers)

    def routing(self, given: Given, experts: int, top_k: int) -> dict[str, Any]:
        given.require("scoring_func", "softmax")
        # transformers ignores this key, which other programs read.
        given.require("norm_topk_prob", False)
        grouped = given.one_of("topk_method", METHODS)
        groups = read_groups(given, experts, top_k, 1) if grouped else {}
        return {"router": "softmax", "normalise": False, **groups}

    def check(self, part: Experts) -> None:
        grouped = {"group_best": 1} if part.groups > 1 else {}
        require(part, router="softmax", normalise=False, **free(part), **grouped)

    def keys_of_routing(self, part: Experts) -> dict[str, Any]:
        keys = {"norm_topk_prob": False, "topk_method": "greedy"}
        if part.groups == 1:
            return keys
        groups = {"n_group": part.groups, "topk_group": part.top_groups}
        return {**keys, **groups, "topk_method": "group_limited_greedy"}


DEEPSEEK2 = LatentFamily(
    "DeepseekV2ForCausalLM",
    "deepseek_v2",
    RULES,
    {
        **DEFAULTS,
        "vocab_size": 102_400,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "moe_intermediate_size": 1407,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.0,
        "topk_method": "greedy",
        "n_group": None,
        "topk_group": None,
        "num_experts_per_tok": None,
        "first_k_dense_replace": 0,
        "norm_topk_prob": False,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    feedforward=SoftmaxExperts(other_count="num_experts"),
    pairing="interleaved",
)
