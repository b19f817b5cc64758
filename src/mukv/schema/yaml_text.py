"""Read and write YAML by the core schema of YAML 1.2, with a one-line error for every mistake.

PyYAML implements YAML 1.1, where 1e-3 is text, `no` is false and a date is an object. In the core
schema of YAML 1.2, 1e-3 is a number, only true and false are booleans, and dates are text.
Duplicate keys are refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
import yaml.composer

from mukv.core.errors import BadInput, shown
from mukv.storage.files import require_regular_file

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
"""Unquoted words that are not text, by type: possible first characters, pattern of the word."""


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, (starts, pattern) in _PLAIN.items():
        for start in starts:
            entry = (f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"))
            table.setdefault("" if start == "\0" else start, []).append(entry)
    return table


LARGEST = 1 << 20
"""Largest YAML text in bytes. The complete configuration of 1,000 different layers is smaller."""
MOST_VALUES = 20_000
"""Largest number of values of a YAML text after its aliases are expanded."""


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()

    composed = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.composed += 1
        if self.composed > MOST_VALUES:
            raise _too_many(self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _values(node, {})
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError):
            # A tag that does not match its text, such as !!bool "x", or a number of 5,000 digits.
            tag = str(node.tag).rpartition(":")[2]
            text = node.value if isinstance(node, yaml.ScalarNode) else type(node).__name__
            raise yaml.constructor.ConstructorError(
                problem=f"{shown(text)} can't be read as !!{tag}", problem_mark=node.start_mark
            ) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, value in node.value:
            name = key.value if isinstance(key, yaml.ScalarNode) else None
            empty = isinstance(value, yaml.ScalarNode) and not value.value
            if node.flow_style and name and ":" in name and empty:
                apart = name.replace(":", ": ", 1)
                raise yaml.constructor.ConstructorError(
                    problem=f"write a space after the colon: {apart}", problem_mark=key.start_mark
                )
            if name is not None and name in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"the key {name!r} is there twice", problem_mark=key.start_mark
                )
            seen.add(name)
        return super().construct_mapping(node, deep)


def _too_many(mark: yaml.Mark) -> yaml.composer.ComposerError:
    problem = f"more than {MOST_VALUES:,} values, aliases expanded"
    return yaml.composer.ComposerError(problem=problem, problem_mark=mark)


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """Count the values of a node with its aliases expanded.

    known: counts of earlier nodes by id, 0 for a node whose count is not finished

    Raises YAML's error for too many values, and for a node that contains itself.
    """
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.composer.ComposerError(
                problem="an alias of what it is inside of", problem_mark=node.start_mark
            )
        return known[id(node)]
    known[id(node)] = 0
    if isinstance(node, yaml.MappingNode):
        total = 1 + sum(_values(part, known) for pair in node.value for part in pair)
    elif isinstance(node, yaml.SequenceNode):
        total = 1 + sum(_values(part, known) for part in node.value)
    else:
        total = 1
    if total > MOST_VALUES:
        raise _too_many(node.start_mark)
    known[id(node)] = total
    return total


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        # YAML folds Unicode's line breaks into spaces except in double quotes.
        style = '"' if any(mark in data for mark in "\x85\u2028\u2029") else None
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Dumper.add_representer(str, _Dumper.represent_str)


def parse_yaml(text: str, where: str) -> Any:
    """Parse a YAML text into values that JSON can represent.

    where: name of the text in errors

    Raises BadInput with line and column.
    """
    if len(text) > LARGEST:
        raise BadInput(where, f"{len(text):,} characters", f"at most {LARGEST:,} of YAML")
    try:
        value = yaml.load(text, _Loader)
        json.dumps(value, ensure_ascii=False).encode()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        raise BadInput(
            where, error.problem or "broken YAML", f"plain, valid YAML is needed{at}"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise BadInput(
            where, f"a character that YAML forbids (line {line})", "valid YAML is needed"
        ) from None
    except RecursionError:
        raise BadInput(where, "lists or mappings nested too deep", "plain YAML is needed") from None
    except UnicodeEncodeError:
        raise BadInput(where, "half of a surrogate pair", "texts of Unicode are needed") from None
    except ValueError:  # from json.dumps: Python's limit of digits
        raise BadInput(where, "a number of too many digits", "a smaller one is needed") from None
    except TypeError as error:  # dates, sets and bytes by tag, as values or keys
        raise BadInput(where, _first_line(error), "plain numbers, texts, lists, mappings") from None
    return value


def has_comment(text: str) -> bool:
    """Whether a text of one value, which `parse_yaml` accepts, ends with a comment."""
    *_, last, _ = yaml.scan(text)
    return bool(text[last.end_mark.index :].strip())


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file. Raises BadInput for any other file."""
    where = str(path)
    try:
        require_regular_file(path)
        if (size := path.stat().st_size) > 4 * LARGEST:
            raise BadInput(where, f"{size:,} bytes", f"at most {LARGEST:,} of YAML")
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        given = f"a byte that is not UTF-8 at {error.start}"
        raise BadInput(where, given, "a YAML file in UTF-8 is needed") from None
    except (OSError, ValueError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(where, _first_line(error), "a readable YAML file is needed") from None
    value = parse_yaml(text, where)
    if not isinstance(value, dict):
        raise BadInput(where, type(value).__name__, "a mapping of keys to values is needed")
    return value


def dump_yaml(mapping: Any) -> str:
    """Format a value as YAML that `parse_yaml` reads as the same value; keys keep their order."""
    return yaml.dump(mapping, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]
