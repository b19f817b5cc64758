"""YAML in and out, by the core schema of YAML 1.2 and with one clear line for every mistake.

PyYAML speaks YAML 1.1, where 1e-3 is text, `no` is false and a date is an object. Here numbers
are numbers, only true and false are truth values, all else is text. Keys given twice are refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from mukv.core.errors import BadInput

_PLAIN = {
    "null": ("~nN\0", r"~|null|Null|NULL|"),
    "bool": ("tTfF", r"true|True|TRUE|false|False|FALSE"),
    "int": ("-+0123456789", r"[-+]?(?:0|[1-9][0-9_]*)|0x[0-9a-fA-F]+"),
    "float": (
        "-+.0123456789",
        r"[-+]?(?:\.[0-9]+|[0-9]+\.[0-9]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9]+[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    ),
    "merge": ("<", r"<<"),
}
"""What a word without quotes may mean other than itself: first characters, whole word."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, (starts, pattern) in _PLAIN.items():
        for start in starts:
            entry = (f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"))
            table.setdefault("" if start == "\0" else start, []).append(entry)
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {name!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # Unicode's own line breaks are folded into spaces anywhere but in double quotes.
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def parse_yaml(text: str, where: str) -> Any:
    """The value that a YAML text stands for, made of what JSON has.

    where: what errors call the text. Raises BadInput with line and column.
    """
    try:
        value = yaml.load(text, _Loader)
        json.dumps(value)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise BadInput(where, error.problem or "broken YAML", f"valid YAML is needed{at}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadInput(
            where, f"a character that YAML forbids (line {line})", "valid YAML is needed"
        ) from None
    except (ValueError, TypeError, RecursionError, AttributeError) as error:
        # Recursive aliases, dates and sets by tag, absurdly long numbers or deep nesting.
        raise BadInput(where, _first_line(error), "plain numbers, texts, lists, mappings") from None
    return value


def has_comment(text: str) -> bool:
    """Whether a text of one value, which `parse_yaml` takes, ends with a comment."""
    *_, last, _ = yaml.scan(text)
    return bool(text[last.end_mark.index :].strip())


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises BadInput for anything else."""
    where = str(path)
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise BadInput(where, "no such file", "the path of a YAML file is needed") from None
    except IsADirectoryError:
        raise BadInput(where, "a folder", "the path of a YAML file is needed") from None
    except UnicodeDecodeError as error:
        given = f"a byte that is not UTF-8 at {error.start}"
        raise BadInput(where, given, "a YAML file in UTF-8 is needed") from None
    except (OSError, ValueError) as error:
        raise BadInput(where, _first_line(error), "a readable YAML file is needed") from None
    value = parse_yaml(text, where)
    if not isinstance(value, dict):
        raise BadInput(where, type(value).__name__, "a mapping of keys to values is needed")
    return value


def dump_yaml(mapping: Any) -> str:
    """The text that `parse_yaml` reads back to the same value; keys keep their order."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
