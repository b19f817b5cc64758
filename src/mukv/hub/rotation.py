"""Read and write the rotations of a config.json.

Two forms are read, the form of transformers 5 (`rope_parameters`) and the older form (`rope_theta`
and `rope_scaling`). Where both are present, they mean what they mean to transformers 5. The older
form is written, because all versions can read it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from mukv.core.errors import BadInput
from mukv.hub.settings import Given, same_number
from mukv.position import LinearScaling, Llama3, RoPE, YaRN
from mukv.position.rope_scaling import AnyScaling

LOCAL, GLOBAL = "sliding_attention", "full_attention"
"""Types of layers: with a window, and without one."""
ORIGINAL = "original_max_position_embeddings"
THETA, LOCAL_THETA = "rope_theta", "rope_local_base_freq"
PARTIAL = "partial_rotary_factor"
PROPORTIONAL = "proportional"
"""Type of a rotation with `partial_rotary_factor` of the pairs of a head, the fastest ones."""
Scaled = Callable[[Given, Given], AnyScaling | None]


def rope_settings(given: Given) -> Given:
    """Return the mapping of the rotation of all layers: of both forms the older one."""
    older = given.inside("rope_scaling")
    return older if older.mapping else given.inside("rope_parameters")


def read_rope(given: Given) -> RoPE:
    """Read the rotation of all layers.

    If both forms are present the older one is used. An original length beside the mapping takes
    precedence over one inside the mapping.
    """
    settings = rope_settings(given)
    for kind in (LOCAL, GLOBAL):
        settings.require(kind)
    outside = {key: given.mapping[key] for key in (ORIGINAL,) if key in given.mapping}
    return read_rotation(Given({**settings.mapping, **outside}, settings.where), given, THETA)


def read_partial_rope(given: Given) -> RoPE:
    """Read the rotation of all layers, in a family that rotates a part of each head."""
    settings = rope_settings(given)
    holder = settings if PARTIAL in settings.mapping else given
    share = holder.number(PARTIAL)
    if share > 1:
        raise BadInput(f"{holder.where}: {PARTIAL}", share, "at most 1")
    return replace(read_rope(_without(given, PARTIAL)), partial=share)


def _without(given: Given, name: str) -> Given:
    """Return the mapping without the keys of this name, at any depth."""

    def rest(mapping: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: rest(value) if isinstance(value, Mapping) else value
            for key, value in mapping.items()
            if key != name
        }

    return replace(given, mapping=rest(given.mapping))


def read_local_rope(given: Given) -> RoPE:
    """Read the rotation of layers with a window, in a family with two rotations."""
    return read_rotation(given.inside("rope_parameters").inside(LOCAL), given, LOCAL_THETA)


def read_global_rope(given: Given) -> RoPE:
    """Read the rotation of layers without a window, in a family with two rotations. Keys of
    `rope_scaling` override those of `rope_parameters`.
    """
    both, over = given.inside("rope_parameters"), given.inside("rope_scaling")
    if given.mapping.get("rope_parameters") is None and "rope_type" not in over.mapping:
        # transformers ignores the old name of this key here, because the new one has a default.
        over.require("type", "default")
    settings = both.inside(GLOBAL)
    where = over.where if over.mapping else settings.where
    return read_rotation(Given({**settings.mapping, **over.mapping}, where), given, THETA)


def read_proportional_rope(settings: Given, given: Given) -> RoPE:
    """Read the rotation of one type of layers, in a family that may rotate a fraction of the pairs
    of each head (p-RoPE), with the frequencies of the whole head.
    """
    if settings.mapping.get("rope_type") != PROPORTIONAL:
        return read_rotation(settings, given, THETA)
    share, factor = settings.number(PARTIAL, 1.0), settings.number("factor", 1.0)
    if share > 1:
        raise BadInput(f"{settings.where}: {PARTIAL}", share, "at most 1")
    scaling = None if factor == 1 else LinearScaling(factor=_factor(settings))
    return RoPE(base=settings.number(THETA, 1e4, low=1.0), scaling=scaling, p=share)


def write_proportional_rope(position: RoPE) -> dict[str, Any]:
    """Return the keys of such a rotation. Raises BadInput for one that they can't express."""
    if position.partial != 1:
        raise BadInput("attention.position.partial", position.partial, "1")
    base = {THETA: position.base}
    if position.p == 1:
        return base | (write_scaling(position.scaling) or {"rope_type": "default"})
    keys = base | {"rope_type": PROPORTIONAL, PARTIAL: position.p}
    if position.scaling is None:
        return keys
    if not isinstance(position.scaling, LinearScaling):
        kind = position.scaling.kind
        raise BadInput("attention.position.scaling", kind, "linear or null where p is not 1")
    return keys | {"factor": position.scaling.factor}


def read_rotation(settings: Given, given: Given, theta: str) -> RoPE:
    """Build a rotation.

    settings: mapping of the rotation. given: whole config.json. theta: key of the base in `given`,
        used if `settings` has none
    """
    for each in (given, settings):
        each.require(PARTIAL, 1)
    kind = "rope_type" if "rope_type" in settings.mapping else "type"
    read: Scaled = settings.one_of(kind, READERS, "default")
    holder, key = (settings, THETA) if THETA in settings.mapping else (given, theta)
    return RoPE(base=holder.number(key, low=1.0), scaling=read(settings, given))


def _factor(settings: Given) -> float:
    factor = settings.number("factor")
    if factor < 1:
        raise BadInput(f"{settings.where}: factor", factor, "at least 1")
    return factor


def _original_length(settings: Given, given: Given) -> int:
    return settings.whole(ORIGINAL, given.whole("max_position_embeddings"))


def _linear(settings: Given, given: Given) -> AnyScaling:
    return LinearScaling(factor=_factor(settings))


def _llama3(settings: Given, given: Given) -> AnyScaling:
    factor = _factor(settings)
    low, high = settings.number("low_freq_factor"), settings.number("high_freq_factor")
    if low >= high:
        allowed = f"less than high_freq_factor ({high:g})"
        raise BadInput(f"{settings.where}: low_freq_factor", low, allowed)
    return Llama3(
        factor=factor,
        low_frequency_factor=low,
        high_frequency_factor=high,
        original_length=_original_length(settings, given),
    )


def _yarn(settings: Given, given: Given) -> AnyScaling:
    original = _original_length(settings, given)
    if "factor" in settings.mapping and settings.mapping["factor"] is None:
        factor = given.whole("max_position_embeddings") / original
        if factor < 1:
            raise BadInput(
                f"{settings.where}: {ORIGINAL}", original, "at most max_position_embeddings"
            )
    else:
        factor = _factor(settings)
    fast, slow = (
        settings.number(key, default, null=True) or default
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0))
    )
    if slow > fast:
        raise BadInput(f"{settings.where}: beta_slow", slow, f"at most beta_fast ({fast:g})")
    return YaRN(
        factor=factor,
        original_length=original,
        fast=fast,
        slow=slow,
        rounded=settings.flag("truncate", True),
        temperature="rotation" if _default_temperature(settings, factor) else "none",
    )


def _default_temperature(settings: Given, factor: float) -> bool:
    """Whether rotated queries and keys are multiplied by 0.1 ln(factor) + 1, rather than by one."""

    def temperature_of(times: float) -> float:
        return 0.1 * times * math.log(factor) + 1

    chosen = settings.number("attention_factor", None, null=True)
    if chosen is None:
        times, over = (
            settings.number(key, None, null=True) for key in ("mscale", "mscale_all_dim")
        )
        chosen = (
            temperature_of(times) / temperature_of(over) if times and over else temperature_of(1.0)
        )
    if same_number(chosen, temperature_of(1.0)):
        return True
    if same_number(chosen, 1.0):
        return False
    key = "attention_factor" if settings.mapping.get("attention_factor") is not None else "mscale"
    allowed = (
        f"not supported; rotated queries and keys are multiplied by 1 or by {temperature_of(1.0):g}"
    )
    raise BadInput(f"{settings.where}: {key}", settings.mapping[key], allowed)


READERS: dict[str, Scaled] = {
    "default": lambda settings, given: None,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


def write_scaling(scaling: AnyScaling | None) -> dict[str, Any] | None:
    """Return the value of `rope_scaling`. Raises BadInput for a scaling that it can't express."""
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
        case YaRN(temperature="rotation" | "none"):
            factor = {} if scaling.temperature == "rotation" else {"attention_factor": 1.0}
            rounded = {} if scaling.rounded else {"truncate": False}
            return {
                "rope_type": "yarn",
                "factor": scaling.factor,
                ORIGINAL: scaling.original_length,
                "beta_fast": scaling.fast,
                "beta_slow": scaling.slow,
                **factor,
                **rounded,
            }
        case YaRN():
            words = "rotation or none"
            raise BadInput("attention.position.scaling.temperature", scaling.temperature, words)
        case _:
            raise BadInput("attention.position.scaling", scaling.kind, "linear, llama3 or yarn")


def write_rope(position: RoPE) -> dict[str, Any]:
    """Return the keys of one rotation for all layers."""
    return {THETA: position.base, "rope_scaling": write_scaling(position.scaling)}


def write_partial_rope(position: RoPE, local: RoPE) -> dict[str, Any]:
    """Return the keys of one rotation for all layers, of a part of each head."""
    return write_rope(position) | {PARTIAL: position.partial}


def write_ropes(position: RoPE, local: RoPE) -> dict[str, Any]:
    """Return the keys of two rotations. The older form can't express a scaled local rotation."""
    if local.scaling is None:
        return write_rope(position) | {LOCAL_THETA: local.base}
    return write_ropes_by_type(position, local)


def write_ropes_by_type(position: RoPE, local: RoPE) -> dict[str, Any]:
    """Return the keys of two rotations in the newer form."""
    return {
        "rope_parameters": {
            kind: {
                THETA: each.base,
                **(write_scaling(each.scaling) or {"rope_type": "default"}),
            }
            for kind, each in ((GLOBAL, position), (LOCAL, local))
        }
    }
