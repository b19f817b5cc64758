"""Frozen dataclasses as a schema: build them from checked plain mappings, and convert them back.

The key `kind` of a mapping selects one of several dataclasses that a field can hold. `merge` merges
a preset with its parent and an override with a preset: mappings are merged key by key, any other
value replaces the old one; if `kind` changes, only keys that the new kind also has are kept.
Missing keys have the field's defaults if the default is of the same kind. pydantic checks plain
types strictly: "3", 3.0 and true are not integers.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from mukv.core.errors import LONGEST_VALUE, BadInput, nearest_name
from mukv.core.names import shortened
from mukv.core.table import Names, PartTable, from_outside, path_of
from mukv.schema.yaml_text import dump_yaml

T = TypeVar("T")
LARGEST_FLOAT = 3.4028235e38
"""Largest finite float32."""


def build(cls: type[T], mapping: Any, where: str = "") -> T:
    """Build an instance of a frozen dataclass from a mapping; missing keys have their defaults.

    where: prefix of the dotted paths in errors

    Raises BadInput for the first mistake, with the number of further ones.
    """
    errors: list[BadInput] = []
    value = _value(cls, mapping, where, errors)
    if errors:
        first, others = errors[0], [error.where for error in errors[1:]]
        if others:
            rest = shortened(", ".join(others), LONGEST_VALUE)
            first.args = (f"{first} (+{len(others)} more: {rest})",)
        raise first
    return value


def to_mapping(value: Any) -> Any:
    """Return the complete mapping that `build` turns into an equal object.

    The `kind` of a class from another package is its dotted path, so that another process can
    import it.
    """
    if is_dataclass(value):
        mapping = {f.name: to_mapping(getattr(value, f.name)) for f in fields(value) if f.init}
        if "kind" in mapping and from_outside(type(value)):
            mapping["kind"] = path_of(type(value))
        return mapping
    if isinstance(value, Mapping):
        return {key: to_mapping(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_mapping(item) for item in value]
    return value


def to_yaml(value: Any) -> str:
    """Return `to_mapping` as YAML text."""
    return dump_yaml(to_mapping(value))


# Type annotations


def options(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a union, and the classes of a table."""
    if get_origin(hint) is Annotated:
        table = table_of(hint)
        return options(get_args(hint)[0]) if table is None else tuple(table.values())
    if get_origin(hint) in (Union, types.UnionType):
        return tuple(option for each in get_args(hint) for option in options(each))
    return (hint,)


def names_of(hint: Any) -> Names[Any] | None:
    """Return the table of names that an annotation of text allows; None if it has none."""
    found = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
    return next((each for each in found if type(each) is Names), None)


def table_of(hint: Any) -> PartTable[Any] | None:
    """Return the table with the classes that an annotation allows; None if it has none."""
    if get_origin(hint) is Annotated:
        return next((each for each in get_args(hint)[1:] if isinstance(each, PartTable)), None)
    if get_origin(hint) in (Union, types.UnionType):
        return next((table for each in get_args(hint) if (table := table_of(each))), None)
    return None


@cache
def hints_of(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in fields(cls) if field.init}


@cache
def kinds_of(cls: type) -> tuple[str, ...]:
    hint = hints_of(cls).get("kind")
    return get_args(hint) if get_origin(hint) is Literal else ()


def classes_of(hint: Any) -> list[type]:
    return [o for o in options(hint) if isinstance(o, type) and is_dataclass(o)]


def _class_of(hint: Any, mapping: Mapping[Any, Any]) -> type | None:
    """Return the dataclass that a mapping describes; None if the mapping does not determine it."""
    classes, kind = classes_of(hint), mapping.get("kind")
    if "kind" in mapping and any(map(kinds_of, classes)):
        classes = [cls for cls in classes if kind in kinds_of(cls)]
        table = table_of(hint)
        if not classes and table is not None and isinstance(kind, str):
            with suppress(BadInput):  # `_instance` reports the error
                classes = [table.find(kind, "kind")]
    elif len(classes) > 1:
        classes = [cls for cls in classes if getattr(cls, "kind_may_be_left_out", False)]
    return classes[0] if len(classes) == 1 else None


def item_hint(hint: Any, container: type, index: int = 0) -> Any:
    """Return the annotation of the items of a tuple or dict annotation; None if there is none."""
    for option in options(hint):
        if get_origin(option) is container:
            args = get_args(option)
            if container is dict:
                return args[1]
            if args[-1] is Ellipsis:
                return args[0]
            return args[index] if index < len(args) else None
    return None


def key_hint(hint: Any, mapping: Mapping[Any, Any], key: str) -> Any:
    """Return the annotation of a key of a dataclass or dict; None if there is none."""
    cls = _class_of(hint, mapping)
    return hints_of(cls).get(key) if cls else item_hint(hint, dict)


def default_of(hint: Any, mapping: Mapping[Any, Any], key: str) -> Any:
    """Return the default of a key as plain data; None if it has none."""
    cls = _class_of(hint, mapping)
    for field in fields(cls) if cls else ():
        if field.name == key and field.default_factory is not MISSING:
            return to_mapping(field.default_factory())
        if field.name == key and field.default is not MISSING:
            return to_mapping(field.default)
    return None


def phrase(hint: Any) -> str:
    """Describe an annotation in words, for errors."""
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    names |= {type(None): "null"}
    parts: list[str] = []
    for option in options(hint):
        if get_origin(option) is Literal:
            parts.append(f"one of {', '.join(map(str, get_args(option)))}")
        elif get_origin(option) is tuple and get_args(option)[-1] is Ellipsis:
            parts.append(f"a list, each: {phrase(get_args(option)[0])}")
        elif get_origin(option) is tuple:
            parts.append(f"a list of {', '.join(map(phrase, get_args(option)))}")
        elif get_origin(option) is dict:
            parts.append(f"a mapping, each: {phrase(get_args(option)[1])}")
        elif is_dataclass(option):
            parts.append(f"a mapping with {', '.join(hints_of(option))}")
        else:
            parts.append(names.get(option, str(option)))
    return " or ".join(dict.fromkeys(parts))


# Merging


def merge(hint: Any, base: Any, change: Any) -> Any:
    """Merge `change` into `base` by the rule of the module's docstring.

    hint: annotation of both
    """
    if not isinstance(base, Mapping) or not isinstance(change, Mapping):
        return change
    merged = {**base, **change}
    cls = _class_of(hint, merged)
    if cls and "kind" in change and change["kind"] != base.get("kind"):
        base = {key: value for key, value in base.items() if key in hints_of(cls)}
    return {**base} | {
        key: merge(key_hint(hint, merged, key), base.get(key), value)
        for key, value in change.items()
    }


def completed(default: Any, given: Any) -> Any:
    """Return `given` with missing keys from `default`, also in nested mappings, if both have the
    same `kind`."""
    if not isinstance(given, Mapping) or not isinstance(default, Mapping):
        return given
    if "kind" in given and given["kind"] != default.get("kind"):
        return given
    return {**default} | {key: completed(default.get(key), item) for key, item in given.items()}


# Building


def _value(hint: Any, given: Any, where: str, errors: list[BadInput]) -> Any:
    """Convert `given` to the annotated type; append mistakes to `errors`."""
    if isinstance(given, Mapping) and classes_of(hint):
        return _instance(hint, given, where, errors)
    if isinstance(given, Mapping) and _holds_classes(item := item_hint(hint, dict)):
        return {k: _value(item, v, join(where, str(k)), errors) for k, v in given.items()}
    if isinstance(given, list | tuple) and _holds_classes(item_hint(hint, tuple)):
        return tuple(
            _value(item_hint(hint, tuple, i), item, join(where, str(i)), errors)
            for i, item in enumerate(given)
        )
    if given is None and type(None) in options(hint):
        return None
    words = [o for o in options(hint) if get_origin(o) is Literal]
    if isinstance(given, str) and any(given in get_args(option) for option in words):
        return given
    if _holds_classes(hint):
        errors.append(BadInput(where or "configuration", given, f"needs {phrase(hint)}"))
        return None
    return _leaf(hint, given, where, errors)


def _holds_classes(hint: Any) -> bool:
    return any(is_dataclass(o) or any(map(_holds_classes, get_args(o))) for o in options(hint))


def _known_as(hint: Any, name: str) -> str | None:
    """Return the kind of the class that is also known by a name, such as latent for "MLA"; None for
    none. Classes give such names as `also`."""
    for option in classes_of(hint):
        if name.lower() in getattr(option, "also", ()):
            return next(iter(kinds_of(option)), None)
    return None


def _instance(hint: Any, given: Mapping[Any, Any], where: str, errors: list[BadInput]) -> Any:
    cls = _class_of(hint, given)
    if cls is None:
        kinds = sorted(kind for option in classes_of(hint) for kind in kinds_of(option))
        kind, table = given.get("kind"), table_of(hint)
        if table is not None and isinstance(kind, str) and "." in kind:
            try:
                table.find(kind, join(where, "kind"))
            except BadInput as error:
                errors.append(error)
                return None
        near = (
            (_known_as(hint, kind) or nearest_name(kind, kinds)) if isinstance(kind, str) else None
        )
        errors.append(BadInput(join(where, "kind"), kind, f"one of {', '.join(kinds)}", near))
        return None
    before = len(errors)
    hints, values = hints_of(cls), {}
    for key, item in given.items():
        path = join(where, str(key))
        if key not in hints:
            errors.append(BadInput(path, item, *_unknown(hint, hints, str(key))))
            continue
        if key == "kind" and item not in kinds_of(cls) and from_outside(cls):
            item = kinds_of(cls)[0]  # it was named by its path
        whole = completed(default_of(cls, given, key), item)
        values[key] = _value(hints[key], whole, path, errors)
    for field in fields(cls):
        required = field.default is MISSING and field.default_factory is MISSING
        if field.init and required and field.name not in given:
            allowed = f"required: {phrase(hints[field.name])}"
            errors.append(BadInput(join(where, field.name), None, allowed))
    if len(errors) > before:
        return None
    try:
        return cls(**values)
    except BadInput as error:
        path = join(where, error.where)
        errors.append(BadInput(path, error.given, error.allowed, error.nearest))
        return None


def _unknown(hint: Any, hints: Mapping[str, Any], key: str) -> tuple[str, str | None]:
    """Return what is allowed in place of an unknown key, and the nearest key; the kinds that have
    such a key, if others do.

    hints: types of the keys of this kind
    """
    having = (option for option in classes_of(hint) if key in hints_of(option))
    others = sorted(kind for option in having for kind in kinds_of(option))
    there = f" of this kind, but of {', '.join(others)}" if others else ""
    return f"no such key{there}; allowed: {', '.join(hints)}", nearest_name(key, hints)


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
        # Through JSON, because only there does pydantic's strict mode accept a list for a tuple.
        return _adapter(hint).validate_json(json.dumps(given, allow_nan=False), strict=True)
    except (ValidationError, ValueError, TypeError, RecursionError):
        words = [word for o in options(hint) if get_origin(o) is Literal for word in get_args(o)]
        near = nearest_name(given, map(str, words)) if isinstance(given, str) else None
        finite = "finite: " if isinstance(given, float) and not math.isfinite(given) else ""
        errors.append(BadInput(where, given, f"needs {finite}{phrase(hint)}", near))
        return None


def join(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key
