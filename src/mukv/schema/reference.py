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
from mukv.schema.schema import (
    classes_of,
    default_of,
    hints_of,
    join,
    kinds_of,
    names_of,
    options,
    phrase,
)
from mukv.schema.yaml_text import dump_yaml

_FIELD = re.compile(r"^([a-z][a-z0-9_]*(?:, [a-z][a-z0-9_]*)*):\s", re.MULTILINE)
"""Start of a field's meaning: at the start of a line only, as sentences may have a colon too."""
ITEM = "N"
"""Placeholder in paths for the index of an item of a list."""


@dataclass(frozen=True)
class Key:
    """One field of one class.

    path: dotted path, with N for the index of a list's item
    kinds: kinds of the class, if other classes at the same path lack the field
    owner: class that has the field
    meaning: meaning in the docstring; empty if there is none
    type: type in words
    default: default as plain data; None also for a required field
    required: whether the field has no default
    allowed: words or kinds that the field takes; None for other types
    hint: annotation of the field
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
        """Return the key's facts as plain data for `--json`."""
        found: dict[str, Any] = {"meaning": self.meaning, "type": self.type}
        found |= {"default": self.default, "required": self.required}
        return {**found, "allowed": self.allowed and list(self.allowed), "kinds": list(self.kinds)}


@cache
def meanings(cls: type) -> dict[str, str]:
    """Return the meaning of each field in the docstrings of the class and its bases."""
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
    """Format a value as YAML on one line; of a mapping with a `kind`, only the `kind`."""
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
    """Return every field of a class except `kind`, whose value follows from the class."""
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
    if (names := names_of(hint)) is not None:
        yield from names


def _type(hint: Any) -> str:
    """Describe an annotation in words, with classes named by their kinds."""
    classes = classes_of(hint)
    if names_of(hint) is not None:
        return f"one of {', '.join(_allowed(hint))}"
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
    """Return the fields at a dotted path: several if classes of different `kind` have the field.

    The index of a list's item is a number or N, or is left out. Raises BadInput for an unknown key.
    """
    words = path.split(".")
    places: list[tuple[str, Any]] = [("", root)]
    found: list[Key] = []
    for number, word in enumerate(words):
        found = _merged(key for where, hint in places for key in _inside(where, hint, word))
        if not found and (word.isdecimal() or word == ITEM) and number:
            continue
        if not found:
            raise _unknown(root, path, word, places)
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
    """Yield the fields named `word` in the classes of an annotation, or of its list items."""
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
    """Merge keys that differ only in their kinds into one key with all these kinds."""
    found: dict[Any, Key] = {}
    for key in keys:
        same = key.path, key.meaning, key.type, repr(key.default), key.required
        if same in found:
            old = found[same]
            kinds = tuple(dict.fromkeys((*old.kinds, *key.kinds)))
            key = Key(**{**vars(old), "kinds": kinds})
        found[same] = key
    return list(found.values())


def _unknown(root: type, path: str, word: str, places: list[tuple[str, Any]]) -> BadInput:
    """Make the error for a path in which no class at these places has the key `word`."""
    siblings = {
        name: join(where, name)
        for place, hint in places
        for cls, where in _classes_inside(hint, place)
        for name in hints_of(cls)
    }
    known = [key.path for _, keys in sections(root) for key in keys]
    same = [name for name in known if name.rpartition(".")[2] == path.rpartition(".")[2]]
    close = nearest_name(word, siblings)
    same.sort(key=lambda name: name.count("."))
    near = same[0] if same else siblings[close] if close else nearest_name(path, known)
    parent = ", ".join(dict.fromkeys(place for place, _ in places if place)) or "a configuration"
    allowed = f"the keys of {parent} are {', '.join(sorted(siblings))}"
    return BadInput("KEY", path, allowed if siblings else f"{parent} has no keys", near)


def sections(root: type) -> list[tuple[tuple[str, type], list[Key]]]:
    """Return every class of a configuration once: its first path, the class, and its keys."""
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
    found = sections(root)
    titles = {cls: _title(path, cls) for (path, cls), _ in found}
    for (_, cls), keys in found:
        title = titles[cls]
        lines += ["", f"## {title}", "", f"`mukv.{cls.__name__}`: {_cell(summary(cls))}."]
        if not keys:
            continue
        lines += ["", "| key | meaning | type | default |", "|---|---|---|---|"]
        for key in keys:
            name = key.path.rpartition(".")[2]
            cells = f"`{name}`", key.meaning, _linked(key, titles), f"`{key.default_text}`"
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _title(path: str, cls: type) -> str:
    kinds = kinds_of(cls)
    title = f"`{path}`" if path else "The whole"
    return title + (f", kind `{kinds[0]}`" if len(kinds) == 1 else "")


def _linked(key: Key, titles: dict[type, str]) -> str:
    """Return a key's type; a mapping without a kind is a link to the section with its keys."""
    classes = [cls for cls, _ in _classes_inside(key.hint, key.path)]
    if len(classes) != 1 or kinds_of(classes[0]):
        return key.type
    anchor = re.sub(r"[^\w\- ]", "", titles[classes[0]].lower()).replace(" ", "-")
    return re.sub(r"\ba mapping|\bmappings", lambda m: f"[{m[0]}](#{anchor})", key.type, count=1)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")
