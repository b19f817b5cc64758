"""The part of a model that one device computes when the mesh axis `tensor` splits its layers."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any

from mukv.core.errors import BadInput
from mukv.model.base import LanguageModel

SPLIT = ("heads", "kv_heads", "hidden", "groups")
"""Fields of attention and feed-forward parts whose dimensions the axis `tensor` splits."""


def shard(model: LanguageModel, parts: int) -> LanguageModel:
    """Return the model with the heads and hidden units of one of `parts` equal devices.

    Parts whose sizes can't be divided are left whole, as the mesh leaves them.
    """
    if parts == 1:
        return model

    def divided(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(map(divided, part))
        if not is_dataclass(part) or isinstance(part, type):
            return part
        changes: dict[str, Any] = {}
        for name in (one.name for one in fields(part) if one.init):
            value, grows = getattr(part, name), getattr(part, "grows", ())
            if name in SPLIT and name in grows and value:
                changes[name] = value if value % parts else value // parts
            else:
                changes[name] = divided(value)
        try:
            return replace(part, **changes)
        except BadInput:
            return part

    return divided(model)
