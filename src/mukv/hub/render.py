"""Render chat templates in a process of its own: `python -P render.py`.

A template is an untrusted program. It may loop for ever or allocate any amount of RAM, which can't
be stopped inside the process that holds a model. This file therefore runs as a separate process
with limits of time and RAM. It reads one JSON object from standard input and writes a list with the
`text` or the one-line `error` of each template and its own values. It imports no other module of
mukv.
"""

from __future__ import annotations

import json
import resource
import sys
from datetime import datetime
from functools import cache
from typing import Any, NoReturn

CPU_SECONDS, MEMORY_BYTES, MOST_CHARACTERS = 5, 1 << 30, 1 << 20


@cache
def program(template: str) -> Any:
    """Compile a template with the names and filters that transformers provides to templates."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.utils import Namespace

    class GenerationBlock(Extension):
        """Renders the body of `{% generation %}...{% endgeneration %}`, which marks the text of the
        model, unchanged."""

        tags = {"generation"}  # noqa: RUF012 (jinja2's own form)

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("same"), [], [], body).set_lineno(line)

        def same(self, caller: Any) -> str:
            return caller()

    class PublicNamespace(Namespace):
        """A namespace without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # `self` may be one of the names
            named = dict(*args[1:], **kwargs)
            for name in named:
                require_public(name)
            Namespace.__init__(args[0], named)

        def __setitem__(self, name: str, value: Any) -> None:
            require_public(name)
            super().__setitem__(name, value)

    class Dict:
        """Function that makes a dict, without the other attributes of the type."""

        def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
            return dict(*args, **kwargs)

        def fromkeys(self, *args: Any) -> dict[Any, Any]:
            return dict.fromkeys(*args)

    def require_public(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace can't have the name {name!r}")

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        form = {"ensure_ascii": ensure_ascii, "indent": indent}
        return json.dumps(value, **form, separators=separators, sort_keys=sort_keys)

    world = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationBlock, loopcontrols]
    )
    world.filters["tojson"] = to_json
    world.globals["raise_exception"] = refuse
    world.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    world.globals["dict"] = Dict()
    world.globals["namespace"] = PublicNamespace
    return world.from_string(template)


def refuse(message: str) -> NoReturn:
    """Raise the error of a template that refuses its values."""
    from jinja2 import TemplateError

    raise TemplateError(message)


def render(template: str, values: dict[str, Any]) -> str:
    """Render a template."""
    pieces: list[str] = []
    length = 0
    for piece in program(template).generate(**values):
        length += len(piece)
        if length > MOST_CHARACTERS:
            refuse(f"more than {MOST_CHARACTERS:,} characters")
        pieces.append(piece)
    text = "".join(pieces)
    text.encode()  # raises for a lone surrogate
    return text


def main() -> None:
    """Render the templates of the request on standard input."""
    request = json.load(sys.stdin)
    try:
        import jinja2  # noqa: F401
    except ImportError:
        json.dump({"missing": "jinja2"}, sys.stdout)
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = []
    for template, own in request["templates"]:
        try:
            answers.append({"text": render(template, {**request["values"], **own})})
        except MemoryError:
            answers.append({"error": f"more than {MEMORY_BYTES >> 30} GB of memory"})
        except Exception as error:
            name = type(error).__name__
            words = (str(error).splitlines() or [""])[0][:200]
            message = words if name == "TemplateError" else f"{name}: {words}" if words else name
            answers.append({"error": message})
    json.dump(answers, sys.stdout)


if __name__ == "__main__":
    main()
