"""Mistral: Llama with a window in every layer, or in none (Jiang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mukv.core.errors import BadInput
from mukv.hub.family import Family
from mukv.hub.layer_keys import LayerWindows, WindowKeys
from mukv.hub.llama import DEFAULTS, RULES
from mukv.hub.rotation import GLOBAL, LOCAL
from mukv.hub.settings import Given


@dataclass(frozen=True)
class EveryLayer(WindowKeys):
    """The same window in all layers, or no windows."""

    def read(self, given: Given, layers: int) -> LayerWindows:
        window = given.whole("sliding_window", null=True)
        types, wanted = given.items("layer_types"), [LOCAL if window else GLOBAL] * layers
        if types not in (None, wanted):
            allowed = f"null, or {wanted[0]} for each of {layers} layers"
            raise BadInput(f"{given.where}: layer_types", types, allowed)
        return [window] * layers

    def write(self, windows: LayerWindows) -> dict[str, Any]:
        if len(set(windows)) > 1:
            raise BadInput("plan: window", sorted(set(map(str, windows))), "one for all layers")
        return {"sliding_window": windows[0]}


DEFAULTS = {
    **DEFAULTS,
    "intermediate_size": 14_336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131_072,
    "sliding_window": 4096,
}
MISTRAL = Family("MistralForCausalLM", "mistral", RULES, DEFAULTS, biases=(), windows=EveryLayer())
