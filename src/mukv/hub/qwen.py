"""Qwen 2, 2.5 and 3; dense models only (Yang et al. 2024, 2025).

Queries, keys and values of Qwen 2 and 2.5 have biases; Qwen 3 normalises queries and keys instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mukv.core.errors import BadInput
from mukv.hub.family import QKV, Family, LayerWindows
from mukv.hub.gemma import ByType
from mukv.hub.llama import DEFAULTS, RULES
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
