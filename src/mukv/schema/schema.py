"""Frozen dataclasses as a schema: plain mappings are checked and become objects, and back.

A field that holds one of several dataclasses names it by `kind`. One rule merges a preset with
its parent and an override with a preset: mappings merge key by key, all else replaces; and where
`kind` changes, only the keys that the new kind also has are kept. What the whole leaves out is as
in the fields' defaults, as long as these are of the kind that is asked for.
Leaf types are checked by pydantic, strictly: "3", 3.0 and true are no integers.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mukv.core.errors import BadInput, nearest_name, shortened
from mukv.schema.yaml_text import dump_yaml

T = TypeVar("T")
LARGEST_FLOAT = 3.4028235e38
"""Beyond it a float32 is infinite."""


def build(cls: type[T], mapping: Any, where: str = "") -> T:
    """An instance of a frozen dataclass from a mapping; what is left out is as in its defaults.

    where: prefix of the dotted paths in errors. Raises BadInput for the first mistake, with the
    number of the others.
    """
    errors: list[BadInput] = []
    value = _value(cls, mapping, where, errors)
    if errors:
        first, others = errors[0], [error.where for error in errors[1:]]
        if others:
            first.args = (f"{first} (+{len(others)} more: {shortened(', '.join(others))})",)
        raise first
    return value


def to_mapping(value: Any) -> Any:
    """The complete mapping that `build` turns into an equal object."""
    if is_dataclass(value):
        return {f.name: to_mapping(getattr(value, f.name)) for f in fields(value) if f.init}
    if isinstance(value, Mapping):
        return {key: to_mapping(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_mapping(item) for item in value]
    return value


def to_yaml(value: Any) -> str:
    """`to_mapping` as YAML text."""
    return dump_yaml(to_mapping(value))


# What an annotation says


def _options(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a union."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


@cache
def _hints(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


@cache
def _kinds(cls: type) -> tuple[str, ...]:
    return get_args(_hints(cls)["kind"]) if "kind" in _hints(cls) else ()


def _classes(hint: Any) -> list[type]:
    return [o for o in _options(hint) if isinstance(o, type) and is_dataclass(o)]


def _class_of(hint: Any, mapping: Mapping[Any, Any]) -> type | None:
    """The dataclass that a mapping describes, if that can be told."""
    classes = _classes(hint)
    if "kind" in mapping and any(map(_kinds, classes)):
        classes = [cls for cls in classes if mapping["kind"] in _kinds(cls)]
    elif len(classes) > 1:
        classes = [cls for cls in classes if getattr(cls, "kind_may_be_left_out", False)]
    return classes[0] if len(classes) == 1 else None


def item_hint(hint: Any, container: type, index: int = 0) -> Any:
    """The annotation of what a tuple or dict of this annotation holds; None if it has none."""
    for option in _options(hint):
        if get_origin(option) is container:
            args = get_args(option)
            if container is dict:
                return args[1]
            if args[-1] is Ellipsis:
                return args[0]
            return args[index] if index < len(args) else None
    return None


def key_hint(hint: Any, mapping: Mapping[Any, Any], key: str) -> Any:
    cls = _class_of(hint, mapping)
    return _hints(cls).get(key) if cls else item_hint(hint, dict)


def default_of(hint: Any, mapping: Mapping[Any, Any], key: str) -> Any:
    """What a key stands for if the mapping leaves it out, as plain data."""
    cls = _class_of(hint, mapping)
    for field in fields(cls) if cls else ():
        if field.name == key and field.default_factory is not MISSING:
            return to_mapping(field.default_factory())
        if field.name == key and field.default is not MISSING:
            return to_mapping(field.default)
    return None


def _phrase(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names |= {type(None): "null"}
    parts: list[str] = []
    for option in _options(hint):
        if get_origin(option) is Literal:
            parts.append(f"one of {', '.join(map(str, get_args(option)))}")
        elif get_origin(option) is tuple and get_args(option)[-1] is Ellipsis:
            parts.append(f"a list, each: {_phrase(get_args(option)[0])}")
        elif get_origin(option) is tuple:
            parts.append(f"a list of {', '.join(map(_phrase, get_args(option)))}")
        elif get_origin(option) is dict:
            parts.append(f"a mapping, each: {_phrase(get_args(option)[1])}")
        elif is_dataclass(option):
            parts.append(f"a mapping with {', '.join(_hints(option))}")
        else:
            parts.append(names.get(option, str(option)))
    return " or ".join(dict.fromkeys(parts))


# Merging


def merge(hint: Any, base: Any, change: Any) -> Any:
    """`base` with `change` over it, by the rule above. hint: the annotation of both."""
    if not isinstance(base, Mapping) or not isinstance(change, Mapping):
        return change
    merged = {**base, **change}
    cls = _class_of(hint, merged)
    if cls and "kind" in change and change["kind"] != base.get("kind"):
        base = {key: value for key, value in base.items() if key in _hints(cls)}
    return {**base} | {
        key: merge(key_hint(hint, merged, key), base.get(key), value)
        for key, value in change.items()
    }


def completed(default: Any, given: Any) -> Any:
    """`given` with what it leaves out from `default`, wherever both are of the same kind."""
    if not isinstance(given, Mapping) or not isinstance(default, Mapping):
        return given
    if "kind" in given and given["kind"] != default.get("kind"):
        return given
    return {**default} | {key: completed(default.get(key), item) for key, item in given.items()}


# Building


def _value(hint: Any, given: Any, where: str, errors: list[BadInput]) -> Any:
    """`given` as the annotated type; mistakes are appended to `errors`."""
    if isinstance(given, Mapping) and _classes(hint):
        return _instance(hint, given, where, errors)
    if isinstance(given, Mapping) and _holds_classes(item := item_hint(hint, dict)):
        return {k: _value(item, v, join(where, str(k)), errors) for k, v in given.items()}
    if isinstance(given, list | tuple) and _holds_classes(item_hint(hint, tuple)):
        return tuple(
            _value(item_hint(hint, tuple, i), item, join(where, str(i)), errors)
            for i, item in enumerate(given)
        )
    if given is None and type(None) in _options(hint):
        return None
    words = [o for o in _options(hint) if get_origin(o) is Literal]
    if isinstance(given, str) and any(given in get_args(option) for option in words):
        return given
    if _holds_classes(hint):
        errors.append(BadInput(where or "configuration", given, f"needs {_phrase(hint)}"))
        return None
    return _leaf(hint, given, where, errors)


def _holds_classes(hint: Any) -> bool:
    options = _options(hint)
    return any(is_dataclass(o) or any(map(_holds_classes, get_args(o))) for o in options)


def _instance(hint: Any, given: Mapping[Any, Any], where: str, errors: list[BadInput]) -> Any:
    cls = _class_of(hint, given)
    if cls is None:
        kinds = sorted(kind for option in _classes(hint) for kind in _kinds(option))
        kind = given.get("kind")
        near = nearest_name(kind, kinds) if isinstance(kind, str) else None
        errors.append(BadInput(join(where, "kind"), kind, f"one of {', '.join(kinds)}", near))
        return None
    before = len(errors)
    hints, values = _hints(cls), {}
    for key, item in given.items():
        path = join(where, str(key))
        if key not in hints:
            allowed = f"no such key; allowed: {', '.join(hints)}"
            errors.append(BadInput(path, item, allowed, nearest_name(str(key), hints)))
            continue
        whole = completed(default_of(cls, given, key), item)
        values[key] = _value(hints[key], whole, path, errors)
    for field in fields(cls):
        required = field.default is MISSING and field.default_factory is MISSING
        if field.init and required and field.name not in given:
            allowed = f"required: {_phrase(hints[field.name])}"
            errors.append(BadInput(join(where, field.name), None, allowed))
    if len(errors) > before:
        return None
    try:
        return cls(**values)
    except BadInput as error:
        path = join(where, error.where)
        errors.append(BadInput(path, error.given, error.allowed, error.nearest))
        return None


@cache
def _adapter(hint: Any) -> TypeAdapter[Any]:
    return TypeAdapter(hint)


def _leaf(hint: Any, given: Any, where: str, errors: list[BadInput]) -> Any:
    if type(given) is int and abs(given) > 1 << 53:
        errors.append(BadInput(where, given, "needs a whole number that JSON has, up to 2**53"))
        return None
    if isinstance(given, float) and LARGEST_FLOAT < abs(given) < math.inf:
        errors.append(BadInput(where, given, "needs a number that 32 bits hold, up to 3.4e38"))
        return None
    try:
        # By way of JSON, since only there does pydantic's strictness take a list for a tuple.
        return _adapter(hint).validate_json(json.dumps(given, allow_nan=False), strict=True)
    except (ValidationError, ValueError, TypeError, RecursionError):
        words = [word for o in _options(hint) if get_origin(o) is Literal for word in get_args(o)]
        near = nearest_name(given, map(str, words)) if isinstance(given, str) else None
        finite = "finite: " if isinstance(given, float) and not math.isfinite(given) else ""
        errors.append(BadInput(where, given, f"needs {finite}{_phrase(hint)}", near))
        return None


def join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
