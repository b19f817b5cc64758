"""Mistral: Llama with a window in every layer, or in none (Jiang et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mukv.core.errors import BadInput
from mukv.hub.family import Family, WindowKeys, Windows
from mukv.hub.llama import RULES
from mukv.hub.settings import Given


@dataclass(frozen=True)
class EveryLayer(WindowKeys):
    def read(self, given: Given, layers: int) -> Windows:
        return [given.get("sliding_window", int, None)] * layers

    def write(self, windows: Windows) -> dict[str, Any]:
        if len(set(windows)) > 1:
            raise BadInput("plan: window", sorted(set(map(str, windows))), "one for all layers")
        return {"sliding_window": windows[0]}


MISTRAL = Family("MistralForCausalLM", "mistral", RULES, biases=(), windows=EveryLayer())
