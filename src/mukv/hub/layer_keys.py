"""Keys of a config.json that differ by layer: windows, and layers without softmax attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mukv.attention import AnyAttention, Attention
from mukv.core.errors import BadInput
from mukv.hub.settings import Given
from mukv.model import Decoder

LayerWindows = Sequence[int | None]


@dataclass(frozen=True)
class WindowKeys:
    """Keys of a config.json for the windows of layers. In this base class no layer has a window."""

    def read(self, given: Given, layers: int) -> LayerWindows:
        """Return each layer's window in tokens; None for a layer without one."""
        given.require("use_sliding_window", False)
        return [None] * layers

    def write(self, windows: LayerWindows) -> dict[str, Any]:
        """Return the keys that express these windows. Raises BadInput for windows that the family
        can't express.
        """
        if any(windows):
            raise BadInput("plan: window", sorted({w for w in windows if w}), "null in all layers")
        return {}


@dataclass(frozen=True)
class MixerKeys:
    """Keys of layers without softmax attention. In this base class there are none."""

    def read(self, given: Given, layers: int) -> Sequence[AnyAttention | None]:
        """Return the mixer of each layer; None for a layer with attention."""
        return [None] * layers

    def write(self, mixers: Sequence[AnyAttention | None]) -> dict[str, Any]:
        """Return the keys that express these mixers. Raises BadInput for mixers that the family
        can't express.
        """
        for mixer in filter(None, mixers):
            raise BadInput("plan: attention", mixer.kind, "grouped")
        return {}


def states(model: Decoder) -> list[AnyAttention | None]:
    """Return the mixer of each layer without softmax attention; None for the others."""
    mixers = (layer.attention for layer in model.layers)
    return [None if isinstance(mixer, Attention) else mixer for mixer in mixers]
