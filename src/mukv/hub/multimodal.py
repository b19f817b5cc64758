"""The text model inside a checkpoint of a model that also reads images or sounds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mukv.core.errors import BadInput
from mukv.hub.base import WeightSource
from mukv.storage.tensors import Cut

TEXT_MODELS = {
    "Gemma3ForConditionalGeneration": "Gemma3ForCausalLM",
    "Gemma4ForConditionalGeneration": "Gemma4ForCausalLM",
}
"""Architecture of the text model, by that of the whole."""
PREFIXES = {"model.language_model.": "model.", "language_model.": ""}
"""Beginning of the names of the text model's tensors, and what they begin with if it is alone; the
second form is that of Gemma 3."""
OUTER = ("tie_word_embeddings", "quantization_config")
"""Keys of the whole that concern the text model."""
HEAD = "lm_head.weight"


class TextTensors:
    """The tensors of the text model, by the names that they have in a model of text alone.

    The other tensors, which make embeddings of images and sounds, are left out.
    """

    def __init__(self, source: WeightSource):
        self._source, self._names = source, {HEAD: HEAD} if HEAD in source.tensors else {}
        for name in source.tensors:
            for prefix, alone in PREFIXES.items():
                if name.startswith(prefix):
                    self._names[alone + name.removeprefix(prefix)] = name
        self.tensors = {alone: source.tensors[name] for alone, name in self._names.items()}

    def read(self, name: str, cut: Cut) -> np.ndarray:
        """Return a copy of a part of a tensor."""
        return self._source.read(self._names[name], cut)


def text_part(config: Mapping[str, Any], path: Path) -> dict[str, Any] | None:
    """Return the config.json of the text model inside of a model that also reads images or sounds;
    None for another model. Raises BadInput if the text model is not described."""
    names = config.get("architectures")
    whole = names[0] if isinstance(names, list) and names else None
    if not isinstance(whole, str) or whole not in TEXT_MODELS:
        return None
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        raise BadInput(f"{path}: text_config", inner, "a mapping")
    ids = {key: value for key, value in config.items() if key.endswith("_token_id")}
    outer = ids | {key: config[key] for key in OUTER if key in config}
    return {**inner, **outer, "architectures": [TEXT_MODELS[whole]]}
