"""Qwen 2 and 2.5, whose queries, keys and values have biases, and Qwen 3, which norms queries and
keys instead; dense models only (Yang et al. 2024, 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mukv.hub.family import QKV, Family, Windows
from mukv.hub.gemma import ByType
from mukv.hub.llama import RULES
from mukv.hub.settings import Given


@dataclass(frozen=True)
class LastLayers(ByType):
    """Windows count only where `use_sliding_window` says so; without types the last layers
    have them."""

    def read(self, given: Given, layers: int) -> Windows:
        if not given.get("use_sliding_window", bool, False):
            return [None] * layers
        return super().read(given, layers)

    def default(self, given: Given, layers: int) -> list[bool]:
        first = given.get("max_window_layers", int, layers)
        return [layer >= first for layer in range(layers)]

    def write(self, windows: Windows) -> dict[str, Any]:
        seen = [place for place, window in enumerate(windows) if window]
        return super().write(windows) | {
            "use_sliding_window": bool(seen),
            "max_window_layers": min(seen, default=len(windows)),
        }


QWEN2 = Family("Qwen2ForCausalLM", "qwen2", RULES, biases=QKV, windows=LastLayers())
QWEN3 = Family("Qwen3ForCausalLM", "qwen3", RULES, query_norm=True, windows=LastLayers())
