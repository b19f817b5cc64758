"""Whether a cache policy fits the layers of a stack."""

from __future__ import annotations

from typing import Any

from mukv.cache import Policy
from mukv.cache.select import All
from mukv.core.errors import BadInput


def check_policy(stack: Any, policy: Policy) -> None:
    """Raise BadInput, with the reason, for a policy that does not fit the layers of a `Stack`."""
    if policy.everything:
        return
    whole = [layer for layer in stack.layers if layer.whole]
    if not whole:
        names = sorted({name for layer in stack.layers for name in layer.attention.stores()})
        allowed = (
            f"full: each layer has a window or a state ({', '.join(names)}), which drops "
            "entries in any case"
        )
        raise BadInput("policy", policy.name, allowed)
    for layer in whole:
        number, chooser = stack.first + layer.index, layer.indexed_by
        policy.check(number, layer.softmax)
        if chooser is not None and (policy.keep.evicts or not isinstance(policy.select, All)):
            allowed = (
                f"a policy under which all entries are kept and read, like int8: layer {number}"
                f" reads by the choice of layer {stack.first + chooser}, so that both must hold "
                "the same entries"
            )
            raise BadInput("policy", policy.name, allowed)
