"""What a config.json says, read key by key: errors name the key. Both spellings are understood,
that of transformers 5 and that before it; the older one, which both can read, is written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput, nearest_name
from mukv.position import Linear, Llama3, RoPE, YaRN
from mukv.position.rope_scaling import AnyScaling

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
}
"""Theirs -> ours; the first of equals is what we write."""
KINDS = {int: "a whole number", float: "a number", str: "text", dict: "a mapping", list: "a list"}
KINDS[bool] = "true or false"


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object. Raises BadInput."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BadInput(str(path), f"a file that can't be read ({error})", "JSON") from None
    if not isinstance(found, dict):
        raise BadInput(str(path), type(found).__name__, "a JSON object")
    return found


@dataclass(frozen=True)
class Given:
    """A mapping out of a config.json, and where it is."""

    mapping: Mapping[str, Any]
    where: str

    def get(self, key: str, kind: type, default: Any = ...) -> Any:
        """The value of a key, or the default where it is absent or null; `...`: required."""
        value = self.mapping.get(key)
        if value is None:
            if default is ...:
                raise BadInput(f"{self.where}: {key}", None, f"required: {KINDS[kind]}")
            return default
        if kind is float and type(value) is int:
            return float(value)
        if type(value) is not kind:
            raise BadInput(f"{self.where}: {key}", value, f"needs {KINDS[kind]}")
        return value

    def inside(self, key: str) -> Given:
        """The mapping at a key, empty if there is none."""
        return Given(self.get(key, dict, {}), f"{self.where}: {key}")

    def require(self, key: str, *allowed: Any) -> None:
        """Raise BadInput unless the key is absent, null or one of these."""
        value = self.mapping.get(key)
        if value is not None and value not in allowed:
            words = ", ".join(map(str, allowed))
            raise BadInput(f"{self.where}: {key}", value, f"not supported; allowed: {words}")

    def one_of(self, key: str, table: Mapping[str, Any], default: str) -> Any:
        """What a table has for the word at a key."""
        word = self.get(key, str, default)
        if word not in table:
            allowed = f"not supported; allowed: {', '.join(table)}"
            raise BadInput(f"{self.where}: {key}", word, allowed, nearest_name(word, table))
        return table[word]


# Rotation


def read_rope(given: Given, layer_type: str | None = None) -> RoPE:
    """The rotation of all layers, or, in files that give several, of one type of layer."""
    given.require("partial_rotary_factor", 1, 1.0)
    theta = given.get("rope_theta", float, 10_000.0)
    said = given.inside("rope_parameters")
    if layer_type in said.mapping:
        said = said.inside(str(layer_type))
    if not said.mapping:
        said = given.inside("rope_scaling")
    said.require("partial_rotary_factor", 1, 1.0)
    kind = "rope_type" if "rope_type" in said.mapping else "type"
    read = said.one_of(kind, READERS, "default")
    length = given.get("max_position_embeddings", int, 2048)
    return RoPE(base=said.get("rope_theta", float, theta), scaling=read(said, length))


def _linear(said: Given, length: int) -> AnyScaling:
    return Linear(factor=said.get("factor", float))


def _llama3(said: Given, length: int) -> AnyScaling:
    return Llama3(
        factor=said.get("factor", float),
        low_frequency_factor=said.get("low_freq_factor", float),
        high_frequency_factor=said.get("high_freq_factor", float),
        original_length=said.get("original_max_position_embeddings", int, length),
    )


def _yarn(said: Given, length: int) -> AnyScaling:
    said.require("truncate", True)
    said.require("attention_factor", 1, 1.0)
    said.require("mscale")
    said.require("mscale_all_dim")
    return YaRN(
        factor=said.get("factor", float),
        original_length=said.get("original_max_position_embeddings", int, length),
        fast=said.get("beta_fast", float, 32.0),
        slow=said.get("beta_slow", float, 1.0),
        temperature="none" if said.mapping.get("attention_factor") else "rotation",
    )


READERS = {
    "default": lambda said, length: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def write_scaling(scaling: AnyScaling | None) -> dict[str, Any] | None:
    """`rope_scaling`. Raises BadInput for one that has no name there."""
    match scaling:
        case None:
            return None
        case Linear():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Llama3():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                "original_max_position_embeddings": scaling.original_length,
            }
        case YaRN(rounded=True, temperature="rotation" | "none"):
            factor = {} if scaling.temperature == "rotation" else {"attention_factor": 1.0}
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                "original_max_position_embeddings": scaling.original_length,
                "beta_fast": scaling.fast,
                "beta_slow": scaling.slow,
                **factor,
            }
        case _:
            raise BadInput("attention.position.scaling", scaling.kind, "linear, llama3 or yarn")
