"""Rotations in a config.json. Both spellings are understood, that of transformers 5
(`rope_parameters`) and that before it (`rope_theta` and `rope_scaling`), and mean what transformers
5 makes of them, even beside each other; the older one, which both can read, is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from mukv.core.errors import BadInput
from mukv.hub.settings import Given, same_number
from mukv.position import LinearScaling, Llama3, RoPE, YaRN
from mukv.position.rope_scaling import AnyScaling

LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""Types of layers, those with a window and those without one."""
ORIGINAL = "original_max_position_embeddings"
THETA, LOCAL_THETA = "rope_theta", "rope_local_base_freq"
Scaled = Callable[[Given, Given], AnyScaling | None]


def read_rope(given: Given) -> RoPE:
    """The rotation of all layers. Where both spellings are there, the older one counts, and the
    length before scaling counts beside the mapping before that inside it."""
    said = given.inside("rope_scaling")
    if not said.mapping:
        said = given.inside("rope_parameters")
    for kind in (LOCAL, GLOBAL):
        said.require(kind)
    outside = {key: given.mapping[key] for key in (ORIGINAL,) if key in given.mapping}
    return _rotation(Given({**said.mapping, **outside}, said.where), given, THETA)


def read_local_rope(given: Given) -> RoPE:
    """The rotation of layers with a window, in a family whose other layers have another one."""
    return _rotation(given.inside("rope_parameters").inside(LOCAL), given, LOCAL_THETA)


def read_global_rope(given: Given) -> RoPE:
    """The rotation of the other layers: `rope_scaling` goes over what `rope_parameters` says."""
    both, over = given.inside("rope_parameters"), given.inside("rope_scaling")
    if given.mapping.get("rope_parameters") is None and "rope_type" not in over.mapping:
        # There the old name of this key counts for nothing beside the default of the new one.
        over.require("type", "default")
    said = both.inside(GLOBAL)
    where = over.where if over.mapping else said.where
    return _rotation(Given({**said.mapping, **over.mapping}, where), given, THETA)


def _rotation(said: Given, given: Given, theta: str) -> RoPE:
    """theta: the key that says the base outside of the mapping."""
    for each in (given, said):
        each.require("partial_rotary_factor", 1)
    kind = "rope_type" if "rope_type" in said.mapping else "type"
    read: Scaled = said.one_of(kind, READERS, "default")
    holder, key = (said, THETA) if THETA in said.mapping else (given, theta)
    return RoPE(base=holder.number(key, low=1.0), scaling=read(said, given))


def _factor(said: Given) -> float:
    factor = said.number("factor")
    if factor < 1:
        raise BadInput(f"{said.where}: factor", factor, "at least 1")
    return factor


def _original_length(said: Given, given: Given) -> int:
    return said.whole(ORIGINAL, given.whole("max_position_embeddings"))


def _linear(said: Given, given: Given) -> AnyScaling:
    return LinearScaling(factor=_factor(said))


def _llama3(said: Given, given: Given) -> AnyScaling:
    factor = _factor(said)
    low, high = said.number("low_freq_factor"), said.number("high_freq_factor")
    if low >= high:
        allowed = f"less than high_freq_factor ({high:g})"
        raise BadInput(f"{said.where}: low_freq_factor", low, allowed)
    return Llama3(
        factor=factor,
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_length=_original_length(said, given),
    )


def _yarn(said: Given, given: Given) -> AnyScaling:
    if "truncate" in said.mapping and said.flag("truncate") is False:
        raise BadInput(f"{said.where}: truncate", False, "not supported; allowed: True")
    original = _original_length(said, given)
    if "factor" in said.mapping and said.mapping["factor"] is None:
        factor = given.whole("max_position_embeddings") / original
        if factor < 1:
            raise BadInput(f"{said.where}: {ORIGINAL}", original, "at most max_position_embeddings")
    else:
        factor = _factor(said)
    fast, slow = (
        said.number(key, default, null=True) or default
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if slow >= fast:
        raise BadInput(f"{said.where}: beta_slow", slow, f"less than beta_fast ({fast:g})")
    return YaRN(
        factor=factor,
        original_length=original,
        fast=fast,
        slow=slow,
        temperature="rotation" if _natural_warmth(said, factor) else "none",
    )


def _natural_warmth(said: Given, factor: float) -> bool:
    """Whether what is rotated is multiplied by 0.1 ln(factor) + 1, and not by one."""

    def warmth(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1

    chosen = said.number("attention_factor", None, null=True)
    if chosen is None:
        times, over = (said.number(key, None, null=True) for key in ("mscale", "mscale_all_dim"))
        chosen = warmth(times) / warmth(over) if times and over else warmth(1.0)
    if same_number(chosen, warmth(1.0)):
        return True
    if same_number(chosen, 1.0):
        return False
    key = "attention_factor" if said.mapping.get("attention_factor") is not None else "mscale"
    allowed = f"not supported; what rotates is multiplied by 1 or by {warmth(1.0):g}"
    raise BadInput(f"{said.where}: {key}", said.mapping[key], allowed)


READERS: dict[str, Scaled] = {
    "default": lambda said, given: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def write_scaling(scaling: AnyScaling | None) -> dict[str, Any] | None:
    """`rope_scaling`. Raises BadInput for one that has no name there."""
    match scaling:
        case None:
            return None
        case LinearScaling():
            return {"rope_type": "linear", "factor": scaling.factor}
        case Llama3():
            return {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_frequency_factor,
                "high_freq_factor": scaling.high_frequency_factor,
                ORIGINAL: scaling.original_length,
            }
        case YaRN(rounded=True, temperature="rotation" | "none"):
            factor = {} if scaling.temperature == "rotation" else {"attention_factor": 1.0}
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                ORIGINAL: scaling.original_length,
                "beta_fast": scaling.fast,
                "beta_slow": scaling.slow,
                **factor,
            }
        case YaRN(rounded=False):
            raise BadInput("attention.position.scaling.rounded", False, "True")
        case YaRN():
            words = "rotation or none"
            raise BadInput("attention.position.scaling.temperature", scaling.temperature, words)
        case _:
            raise BadInput("attention.position.scaling", scaling.kind, "linear, llama3 or yarn")


def write_rope(position: RoPE) -> dict[str, Any]:
    """Of all layers."""
    return {THETA: position.base, "rope_scaling": write_scaling(position.scaling)}


def write_ropes(position: RoPE, local: RoPE) -> dict[str, Any]:
    """Of a family with two: the older spelling has no words for a local one that is scaled."""
    if local.scaling is None:
        return write_rope(position) | {LOCAL_THETA: local.base}
    return {
        "rope_parameters": {
            kind: {
                THETA: each.base,
                **(write_scaling(each.scaling) or {"rope_type": "default"}),
            }
            for kind, each in ((GLOBAL, position), (LOCAL, local))
        }
    }
