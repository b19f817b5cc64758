"""Resolve a run's configuration: presets that extend each other, and overrides.

Presets and overrides are merged by the rule of `schema.merge`: a preset differs from the one that
it extends only in the keys that it names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput, nearest_name
from mukv.schema.schema import completed, default_of, item_hint, join, key_hint, merge
from mukv.schema.yaml_text import has_comment, parse_yaml, read_yaml


def apply_overrides(cls: type, mapping: Mapping[str, Any], overrides: Iterable[str]) -> dict:
    """Merge each "path.to.key=value" into the mapping, in order; the value is YAML.

    A number in a path is an index into a list. Keys that the mapping leaves out have the class's
    defaults. A value of an earlier override is kept when a later override changes `kind`.

    Raises BadInput for an override that can't be parsed, for a path that continues below a plain
    value, and for an index that a list does not have; `build` checks names and types of keys.
    """
    result: Any = dict(mapping)
    done: list[str] = []
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            raise BadInput("override", override, "write path.to.key=value")
        value = parse_yaml(text, path)
        if has_comment(text):
            raise BadInput(path, text, "no comment: put text with a # in quotes of YAML")
        result = _set(cls, result, None, keys, value, "", done)
        done.append(path)
    return result


def resolve_preset(cls: type, name: str | Path, folder: Path) -> dict[str, Any]:
    """Read the mapping of a YAML file, merged into those of the files that it `extends`.

    name: NAME of a file NAME.yaml in `folder`, or a path; a path in `extends` is relative to the
        file that contains it
    folder: folder of the presets

    Raises BadInput for an unknown name and for files that extend each other in a circle.
    """
    chain: list[Path] = []
    mappings: list[dict[str, Any]] = []
    here, where = Path(), "preset"
    parent: Any = str(name)
    while parent is not None:
        path = _preset_path(parent, folder, here, where)
        if path in chain:
            raise BadInput(where, parent, "files that do not extend each other in a circle")
        mapping = read_yaml(path)
        here, where, parent = path.parent, f"{path}: extends", mapping.pop("extends", None)
        chain.append(path)
        mappings.append(mapping)
    merged: dict[str, Any] = {}
    for mapping in reversed(mappings):
        merged = merge(cls, merged, mapping)
    return merged


def _preset_path(name: Any, folder: Path, here: Path, where: str) -> Path:
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    if isinstance(name, str):
        if name in names:
            return (folder / f"{name}.yaml").resolve()
        if name.endswith((".yaml", ".yml")) or "/" in name:
            try:
                return (here / name).expanduser().resolve()
            except (OSError, ValueError, RuntimeError):
                raise BadInput(where, name, "the path of a YAML file is needed") from None
    allowed = f"a YAML file, or one of the presets: {', '.join(names)}"
    raise BadInput(where, name, allowed, nearest_name(str(name), names))


def _set(
    hint: Any,
    node: Any,
    default: Any,
    keys: Sequence[str],
    value: Any,
    where: str,
    done: Sequence[str],
) -> Any:
    """Return `node` with `value` merged in at `keys`.

    default: the class's default of the node; it is copied only if the node is missing and a key is
        an index into the default, a list
    done: paths of earlier overrides
    """
    if not keys:
        return merge(hint, node, value)
    key, rest = keys[0], keys[1:]
    here = join(where, key)
    if node is None and isinstance(default, list):
        node = default
    if isinstance(node, list):
        if not (key.isdecimal() and key.isascii() and len(key) < 9 and int(key) < len(node)):
            allowed = (
                f"an index from 0 to {len(node) - 1}" if node else "nothing: the list is empty"
            )
            raise BadInput(here, key, allowed)
        index = int(key)
        item = _set(item_hint(hint, tuple, index), node[index], None, rest, value, here, done)
        return [*node[:index], item, *node[index + 1 :]]
    if node is not None and not isinstance(node, Mapping):
        raise BadInput(here, node, f"{where} is a plain value, which has no keys")
    node = node or {}
    whole = completed(default, node)
    inner = key_hint(hint, whole, key)
    fallback = whole.get(key, default_of(hint, whole, key)) if key not in node else None
    child = _set(inner, node.get(key), fallback, rest, value, here, done)
    if key != "kind":
        return {**node, key: child}
    typed = {
        name: old
        for name, old in node.items()
        if any(f"{path}.".startswith(f"{join(where, name)}.") for path in done)
    }
    return {**typed, **merge(hint, node, {key: child})}
