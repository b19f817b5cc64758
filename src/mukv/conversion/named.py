"""Conversions by name: `gqa:2`, `mqa`, `shared_kv`, `mla:128`, `reuse:2`, with options in
parentheses: `mla(rope=2):128`."""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mukv.conversion.base import Conversion
from mukv.conversion.kv_heads import FewerHeads
from mukv.conversion.latent import TruncatedLatent
from mukv.conversion.reuse import CrossLayer
from mukv.conversion.shared_kv import SharedVectors
from mukv.core.errors import BadInput, nearest_name, unknown_name
from mukv.core.table import PartTable

CONVERSIONS = PartTable(
    "conversion",
    Conversion,
    {"gqa": FewerHeads, "shared_kv": SharedVectors, "mla": TruncatedLatent, "reuse": CrossLayer},
    kinds=False,
)
SHORT = {"mqa": ("gqa", "1")}
"""Short names of conversions, with the name and number that they stand for."""
PATTERN = re.compile(r"(?P<name>[\w.]+)(?:\((?P<options>[^()]*)\))?(?::(?P<number>.*))?")


def parse(text: str, where: str = "--to") -> Conversion:
    """Parse the name of a conversion. where: what it is called in errors. Raises BadInput."""
    match = PATTERN.fullmatch(text.strip())
    if match is None:
        raise BadInput(where, text, f"NAME:NUMBER or NAME(option=value):NUMBER, such as {usages()}")
    name, options, number = match["name"], match["options"], match["number"]
    if name in SHORT:
        if number is not None:
            raise BadInput(where, text, f"{name} has no number; or {':'.join(SHORT[name])}")
        name, number = SHORT[name]
    if name not in CONVERSIONS and "." not in name:
        near = nearest_name(name, [*CONVERSIONS, *SHORT])
        raise BadInput(where, text, f"one of {usages()}", near)
    found = CONVERSIONS.find(name, where)
    main, *others = fields(found)
    hints = get_type_hints(found)
    values: dict[str, Any] = {}
    if number is not None and options is None and number.endswith(")"):
        number, _, options = number.partition("(")
        raise BadInput(where, text, "options before the colon", f"{name}({options}:{number}")
    if number is not None:
        values[main.name] = _whole(number, where, text)
    elif main.default is MISSING:
        raise BadInput(where, text, f"a number behind a colon, such as {usage(name)}")
    for option in filter(None, (options or "").split(",")):
        key, equals, value = (part.strip() for part in option.partition("="))
        known = [other.name for other in others]
        if key not in known or not equals:
            allowed = f"the options {', '.join(known)}" if known else "no options"
            raise BadInput(where, text, f"{name} has {allowed}", nearest_name(key, known))
        if get_origin(hints[key]) is Literal:
            if value not in get_args(hints[key]):
                raise unknown_name(f"{where} {text}: {key}", value, get_args(hints[key]))
            values[key] = value
        else:
            values[key] = _whole(value, where, text)
    return found(**values)


def usages() -> str:
    """Return all conversions as they are typed."""
    return ", ".join([*map(usage, CONVERSIONS), *SHORT])


def usage(name: str) -> str:
    main = fields(CONVERSIONS[name])[0]
    number = f":{main.name.upper()}"
    return f"{name}{number}" if main.default is MISSING else f"{name}[{number}]"


def _whole(text: str, where: str, given: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text[:9]) > 0 and len(text) <= 9):
        raise BadInput(where, given, f"a whole number of at least 1 in place of {text!r}")
    return int(text)
