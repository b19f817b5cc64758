"""Qwen 2, 2.5 and 3 (Yang et al. 2024, 2025).

Queries, keys and values of Qwen 2 and 2.5 have biases; Qwen 3 normalises queries and keys instead.
Models of Qwen 3 with experts are a family of their own; those of Qwen 2 are not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mukv.core.errors import BadInput
from mukv.hub.base import Rule
from mukv.hub.family import QKV, Family
from mukv.hub.feedforward import SparseExperts
from mukv.hub.gemma import ByType
from mukv.hub.layer_keys import LayerWindows
from mukv.hub.llama import DEFAULTS, ENDS, LAYER, NORMS, PROJECTIONS, RULES
from mukv.hub.rotation import LOCAL
from mukv.hub.settings import Given


@dataclass(frozen=True)
class LastLayers(ByType):
    """Windows apply only if `use_sliding_window` is true; without `layer_types` the last layers
    have them.
    """

    def default(self, given: Given, layers: int) -> list[bool]:
        first = given.whole("max_window_layers", low=0)
        counts = given.flag("use_sliding_window") and given.whole("sliding_window", null=True)
        return [bool(counts) and layer >= first for layer in range(layers)]

    def window(self, given: Given) -> int:
        if not given.flag("use_sliding_window"):
            allowed = f"true, since layer_types has {LOCAL}"
            raise BadInput(f"{given.where}: use_sliding_window", False, allowed)
        return super().window(given)

    def write(self, windows: LayerWindows) -> dict[str, Any]:
        seen = [place for place, window in enumerate(windows) if window]
        return super().write(windows) | {
            "use_sliding_window": bool(seen),
            "max_window_layers": min(seen, default=len(windows)),
        }


MLP = f"{LAYER}.mlp"
EXPERT = f"{MLP}.experts.{{expert}}"
EXPERTS = (
    Rule(f"{MLP}.gate.weight", "mlp.router", "experts embed"),
    Rule(f"{EXPERT}.gate_proj.weight", "mlp.gate", "expert_hidden embed"),
    Rule(f"{EXPERT}.up_proj.weight", "mlp.up", "expert_hidden embed"),
    Rule(f"{EXPERT}.down_proj.weight", "mlp.down", "embed expert_hidden"),
    Rule(f"{MLP}.gate_proj.weight", "mlp.gate", "hidden embed"),
    Rule(f"{MLP}.up_proj.weight", "mlp.up", "hidden embed"),
    Rule(f"{MLP}.down_proj.weight", "mlp.down", "embed hidden"),
)
"""Rules of the feed-forward parts: experts in some layers, a gated MLP in others."""
DEFAULTS = {
    **DEFAULTS,
    "vocab_size": 151_936,
    "intermediate_size": 22_016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32_768,
    "bos_token_id": None,
    "eos_token_id": None,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
QWEN2 = Family("Qwen2ForCausalLM", "qwen2", RULES, DEFAULTS, biases=QKV, windows=LastLayers())
QWEN3 = Family(
    "Qwen3ForCausalLM",
    "qwen3",
    RULES,
    {**DEFAULTS, "head_dim": 128},
    query_norm="head",
    windows=LastLayers(),
)
QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    "qwen3_moe",
    (*ENDS, *PROJECTIONS, *EXPERTS, *NORMS),
    {
        **DEFAULTS,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "head_dim": None,
        "decoder_sparse_step": 1,
        "moe_intermediate_size": 768,
        "num_experts_per_tok": 8,
        "num_experts": 128,
        "norm_topk_prob": False,
    },
    query_norm="head",
    feedforward=SparseExperts(other_count="num_local_experts"),
)
