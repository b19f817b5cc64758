"""Parse and print the words of a policy's name: `[PEER:]NAME[(FIELD=VALUE,...)][:BUDGET]`.

A word names one part of a policy. FIELD is a field of the part's dataclass, and VALUE is YAML:
numbers, true, false, null, words. PEER is a library whose defaults the part takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, TypeVar

from mukv.core.errors import BadInput, nearest_name
from mukv.schema.schema import build, join
from mukv.schema.yaml_text import parse_yaml

T = TypeVar("T")
SET_ELSEWHERE = frozenset({"budget", "spread", "refine", "when", "merge", "calibrated", "asks"})
"""Fields that a word can't set: other words of the name set them, or a calibration."""
PEERS: dict[str, dict[str, dict[str, Any]]] = {
    "kvpress": {
        "streaming": {},
        "snapkv": {"window": 64},
        "tova": {},
        "knorm": {"recent": 0},
        "keydiff": {"recent": 0},
        "expected": {"recent": 0},
        "lagkv": {"recent": 0},
        "leverage": {"recent": 0},
        "cur": {"recent": 0},
        "compactor": {},
        "kvzip": {"recent": 0},
        "kvzap": {"sinks": 0, "recent": 0},
        "random": {"recent": 0},
        "threshold": {},
        "critical": {},
        "chunk": {},
        "pyramid": {},
        "adaptive": {},
        "merge": {},
        "think": {"ratio": 0.0},
    }
}
"""Fields whose defaults in another library (kvpress 0.5.5) differ from ours, with its defaults; by
library and name of the part."""


@dataclass(frozen=True)
class Word:
    """One part of a policy's name.

    text: the word as typed
    name: name of the part
    given: values of its fields, those of the peer's defaults included
    budget: its own budget; None if it has none
    """

    text: str
    name: str
    given: Mapping[str, Any]
    budget: float | None


def split(text: str, separator: str) -> list[str]:
    """Split a text at separators outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == separator and depth <= 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def read_word(text: str, where: str) -> Word:
    """Parse one word. Raises BadInput for a text that does not have this form.

    where: name of the policy in errors
    """
    text = text.strip()
    peer, found, rest = text.partition(":")
    if not found or peer not in PEERS:
        peer, rest = "", text
    name, opened, inside = rest.partition("(")
    if opened:
        inside, closed, rest = inside.rpartition(")")
        budget = rest.partition(":")
        if not closed or "(" in inside or ")" in inside or budget[0].strip():
            raise BadInput(where, text, "NAME(FIELD=VALUE,...):BUDGET, such as snapkv(window=64)")
        first, _, early = name.partition(":")
        if early[:1].isdigit() or early[:1] == ".":
            near = f"{peer}{':' * bool(peer)}{first}({inside}):{early}"
            raise BadInput(where, text, "parameters before the budget", near)
        own = budget[2] if budget[1] else None
    else:
        name, colon, own = rest.partition(":")
        own = own if colon else None
    name = name.strip()
    given = _defaults_of(peer, name, where) | _given(inside, f"{where}: {name}", text)
    return Word(text, name, given, None if own is None else _number(own, where, text))


def parameters(cls: type) -> list[str]:
    """Return the names of the fields that a word can set."""
    if not getattr(cls, "evicts", True):
        return []
    return [field.name for field in fields(cls) if field.init and field.name not in SET_ELSEWHERE]


def built(cls: type[T], word: Word, where: str) -> T:
    """Build a part with the fields of a word. Raises BadInput for unknown fields and for values
    that do not fit.
    """
    known, path = parameters(cls), f"{where}: {word.name}"
    for key, value in word.given.items():
        if key not in known:
            has = f"allowed: {', '.join(known)}" if known else "it has none"
            near = nearest_name(key, known)
            raise BadInput(join(path, key), value, f"no such parameter; {has}", near)
    return build(cls, dict(word.given), path) if word.given else cls()


def shown(name: str, part: Any, budget: float | None) -> str:
    """Return the word of a part: its name, the fields that are not at their defaults, its budget
    (None for none)."""
    changed = [
        f"{field.name}={_value(getattr(part, field.name))}"
        for field in fields(part)
        if field.name in parameters(type(part)) and getattr(part, field.name) != _default(field)
    ]
    inside = f"({','.join(changed)})" if changed else ""
    return name + inside + ("" if budget is None else f":{_value(budget)}")


def _defaults_of(peer: str, name: str, where: str) -> dict[str, Any]:
    if not peer:
        return {}
    known = PEERS[peer]
    if name not in known:
        allowed = f"a policy whose defaults in {peer} are known: {', '.join(known)}"
        raise BadInput(where, f"{peer}:{name}", allowed, nearest_name(name, known))
    return dict(known[name])


def _given(inside: str, where: str, text: str) -> dict[str, Any]:
    given: dict[str, Any] = {}
    for item in inside.split(",") if inside.strip() else ():
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not key or not value:
            raise BadInput(where, item.strip(), "FIELD=VALUE, such as window=64")
        if key in given:
            raise BadInput(join(where, key), text, "each parameter once")
        given[key] = parse_yaml(value, join(where, key))
    return given


def _number(text: str, where: str, word: str) -> float:
    try:
        return float(text)
    except ValueError:
        near = nearest_name(word.partition(":")[0], PEERS)
        allowed = "a number behind the colon, such as snapkv:0.5"
        raise BadInput(where, word, allowed, near) from None


def _value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float) and value.is_integer() and abs(value) < 1 << 53:
        return str(int(value))
    return str(value)


def _default(field: Any) -> Any:
    return field.default if field.default is not MISSING else field.default_factory()
