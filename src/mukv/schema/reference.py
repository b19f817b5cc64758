"""The configuration reference: meaning, type, default and allowed values of every key.

Meanings come from the docstrings of the classes, where each field has a line "name: meaning" (or
"a, b: meaning"), types and defaults from the fields.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from mukv.core.errors import BadInput, nearest_name
from mukv.schema.schema import classes_of, default_of, hints_of, join, kinds_of, options, phrase
from mukv.schema.yaml_text import dump_yaml

_FIELD = re.compile(r"(?<![\w`.])([a-z][a-z0-9_]*(?:, [a-z][a-z0-9_]*)*):\s")
ITEM = "N"
"""Stands for the number of an entry of a list, and for a key of a mapping of any keys."""


@dataclass(frozen=True)
class Key:
    """One field of one class.

    path: dotted path, with N for the number of an entry
    kinds: kinds of the class, where others in its place lack the field
    owner: class that has the field
    meaning: its line in the docstring; empty if there is none
    type: its type in words
    default: its default as plain data; None also where it is required
    required: whether it has no default
    allowed: words or kinds that it takes; None for other types
    hint: its annotation
    """

    path: str
    kinds: tuple[str, ...]
    owner: type
    meaning: str
    type: str
    default: Any
    required: bool
    allowed: tuple[str, ...] | None
    hint: Any

    @property
    def default_text(self) -> str:
        """The default as YAML on one line."""
        if self.required:
            return "required"
        if isinstance(self.default, dict) and "kind" not in self.default and classes_of(self.hint):
            return "{}"
        return short_yaml(self.default)

    def facts(self) -> dict[str, Any]:
        """The same as plain data."""
        found: dict[str, Any] = {"meaning": self.meaning, "type": self.type}
        found |= {"default": self.default, "required": self.required}
        return {**found, "allowed": self.allowed and list(self.allowed), "kinds": list(self.kinds)}


@cache
def meanings(cls: type) -> dict[str, str]:
    """Return the meaning of each field that a docstring of the class or of its bases tells."""
    found: dict[str, str] = {}
    names = {field.name for field in fields(cls)}
    for base in cls.__mro__:
        for text in _own_doc(base).split("\n\n"):
            marks = [mark for mark in _FIELD.finditer(text) if names & set(mark[1].split(", "))]
            ends = [*(mark.start() for mark in marks[1:]), len(text)]
            for mark, end in zip(marks, ends, strict=False):
                meaning = " ".join(text[mark.end() : end].split()).rstrip(".")
                meaning = re.sub(r"\bNone\b", "null", meaning)  # as YAML has it
                for name in mark[1].split(", "):
                    found.setdefault(name, meaning)
    return {name: meaning for name, meaning in found.items() if name in names}


def summary(cls: type) -> str:
    """Return the first sentence of the docstring of a class, or else of its module."""
    names = {field.name for field in fields(cls)}
    first = _own_doc(cls).split("\n\n")[0]
    mark = next((m for m in _FIELD.finditer(first) if names & set(m[1].split(", "))), None)
    text = " ".join(first[: mark.start() if mark else None].split())
    text = text or " ".join((inspect.getdoc(sys.modules[cls.__module__]) or "").split())
    sentence = re.match(r"(.+?[^.\sA-Z)]\)?[.:])(?= [A-Z]|$)|(.+?\))(?=\.)", text)
    return (sentence[0] if sentence else text).rstrip(".:")


def _own_doc(cls: type) -> str:
    text = vars(cls).get("__doc__") or ""
    # A dataclass without a docstring is given its signature as one.
    return "" if text.startswith(f"{cls.__name__}(") else inspect.cleandoc(text)


def short_yaml(value: Any) -> str:
    """A value as YAML on one line; of a mapping with a `kind` only that."""
    if isinstance(value, dict) and "kind" in value:
        value = {"kind": value["kind"]}
    text = dump_yaml(value).strip().removesuffix("...").strip()
    if isinstance(value, dict | list) and value:
        return _flow(value)
    return text


def _flow(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    return short_yaml(value)


def keys_of(cls: type, path: str = "") -> list[Key]:
    """Return every field of a class but `kind`, which the choice of the class sets."""
    return [
        _key(cls, name, join(path, name))
        for name in hints_of(cls)
        if name != "kind" or not kinds_of(cls)
    ]


def _key(cls: type, name: str, path: str, kinds: tuple[str, ...] = ()) -> Key:
    hint = hints_of(cls)[name]
    field = next(field for field in fields(cls) if field.name == name)
    required = field.default is MISSING and field.default_factory is MISSING
    meaning, allowed = meanings(cls).get(name, ""), tuple(_allowed(hint))
    allowed = None if set(allowed) <= {"null"} else allowed
    default = default_of(cls, {}, name)
    return Key(path, kinds, cls, meaning, _type(hint), default, required, allowed, hint)


def _allowed(hint: Any) -> Iterator[str]:
    for option in options(hint):
        if get_origin(option) is Literal:
            yield from map(str, get_args(option))
        elif is_dataclass(option) and isinstance(option, type):
            yield from kinds_of(option)
        elif option is bool:
            yield from ("true", "false")
        elif option is NoneType:
            yield "null"


def _type(hint: Any) -> str:
    """The type in words; classes by their kinds."""
    classes = classes_of(hint)
    if not classes:
        inner = [get_args(option)[0] for option in options(hint) if get_origin(option) is tuple]
        if inner and classes_of(inner[0]):
            return "a list of mappings"
        return phrase(hint)
    words = [kind for cls in classes for kind in kinds_of(cls)]
    text = f"a mapping of kind {', '.join(words)}" if words else "a mapping"
    others = [option for option in options(hint) if option not in classes]
    return " or ".join([text, *(phrase(option) for option in others)])


def find(root: type, path: str) -> list[Key]:
    """Return the fields that a dotted path means: several where it depends on a `kind`.

    Entries of a list are named by a number or N, or not at all. Raises BadInput for a key that
    there is not.
    """
    words = path.split(".")
    places: list[tuple[str, Any]] = [("", root)]
    found: list[Key] = []
    for number, word in enumerate(words):
        found = _merged(key for where, hint in places for key in _inside(where, hint, word))
        if not found and (word.isdecimal() or word == ITEM) and number:
            continue
        if not found:
            raise _unknown(root, path, ".".join(words[: number + 1]))
        places = [(key.path, key.hint) for key in found]
    return found


def inside(keys: Iterable[Key]) -> list[tuple[str, str, list[Key]]]:
    """Return kind, meaning and fields of every class that these fields take."""
    found: dict[type, tuple[str, str, list[Key]]] = {}
    for key in keys:
        for cls, path in _classes_inside(key.hint, key.path):
            kinds = kinds_of(cls)
            kind = kinds[0] if len(kinds) == 1 else ""
            found.setdefault(cls, (kind, summary(cls), keys_of(cls, path)))
    return list(found.values())


def _inside(where: str, hint: Any, word: str) -> Iterator[Key]:
    """Fields of this name in the classes of an annotation, or in those of its entries."""
    classes = classes_of(hint)
    having = [cls for cls in classes if word in hints_of(cls)]
    for cls in having:
        kinds = kinds_of(cls) if len(having) < len(classes) or len(classes) > 1 else ()
        yield _key(cls, word, join(where, word), kinds)
    for option in options(hint):
        if get_origin(option) is tuple:
            for item in dict.fromkeys(get_args(option)):
                if item is not Ellipsis:
                    yield from _inside(join(where, ITEM), item, word)


def _merged(keys: Iterable[Key]) -> list[Key]:
    """Keys without repetition: those that say the same are one, of all their kinds."""
    found: dict[Any, Key] = {}
    for key in keys:
        same = key.path, key.meaning, key.type, repr(key.default), key.required
        if same in found:
            old = found[same]
            kinds = tuple(dict.fromkeys((*old.kinds, *key.kinds)))
            key = Key(**{**vars(old), "kinds": kinds})
        found[same] = key
    return list(found.values())


def _unknown(root: type, path: str, where: str) -> BadInput:
    known = [key.path for _, keys in sections(root) for key in keys]
    plain = [name.replace(f".{ITEM}", "") for name in known]
    last = path.rpartition(".")[2]
    words = [word for word in path.split(".") if not word.isdecimal() and word != ITEM]
    prefix = f"{_parent(where)}." if _parent(where) else ""
    beside = [name for name in plain if name.startswith(prefix)]
    near = nearest_name(".".join(words), beside) or nearest_name(".".join(words), plain)
    others = [name for name in known if name.rpartition(".")[2] == last]
    if others and (near is None or near.rpartition(".")[2] != last):
        near = others[0]
    inside = {name.removeprefix(prefix).partition(".")[0] for name in beside}
    allowed = f"the keys of {_parent(where) or 'a configuration'} are {', '.join(sorted(inside))}"
    return BadInput("KEY", path, allowed, near)


def _parent(path: str) -> str:
    return path.rpartition(".")[0].replace(f".{ITEM}", "")


def sections(root: type) -> list[tuple[tuple[str, type], list[Key]]]:
    """Return every class that a configuration is made of, once: where it is first, and its keys."""
    found: list[tuple[tuple[str, type], list[Key]]] = []
    seen: set[type] = set()

    def walk(path: str, cls: type) -> None:
        seen.add(cls)
        keys = keys_of(cls, path)
        found.append(((path, cls), keys))
        for key in keys:
            for inner, where in _classes_inside(key.hint, key.path):
                if inner not in seen:
                    walk(where, inner)

    walk("", root)
    return found


def _classes_inside(hint: Any, path: str) -> Iterator[tuple[type, str]]:
    for cls in classes_of(hint):
        yield cls, path
    for option in options(hint):
        if get_origin(option) is tuple:
            for item in dict.fromkeys(get_args(option)):
                if item is not Ellipsis:
                    yield from _classes_inside(item, join(path, ITEM))


def markdown(root: type) -> str:
    """Return the whole reference as a page: a section with a table for each class."""
    lines = [
        "# Configuration reference",
        "",
        "Every key of a YAML file or an override, as `mukv docs KEY` shows it. `N` stands for the",
        "number of an entry of a list. Where a key takes a mapping of a `kind`, a section for each",
        "kind follows. This page is written by `python docs/configuration.py`.",
    ]
    for (path, cls), keys in sections(root):
        kinds = kinds_of(cls)
        title = f"`{path}`" if path else "The whole"
        title += f", kind `{kinds[0]}`" if len(kinds) == 1 else ""
        lines += ["", f"## {title}", "", f"`mukv.{cls.__name__}`: {_cell(summary(cls))}."]
        if not keys:
            continue
        lines += ["", "| key | meaning | type | default |", "|---|---|---|---|"]
        for key in keys:
            name = key.path.rpartition(".")[2]
            cells = f"`{name}`", key.meaning, key.type, f"`{key.default_text}`"
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
