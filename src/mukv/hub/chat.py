"""Chat templates: a conversation as the text that a model was trained to answer.

A template comes with the model, as chat_template.jinja or in tokenizer_config.json. It is rendered
by jinja2 in a sandbox, in a process of its own (render.py says why), with the names that
transformers gives its templates.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput, Failed, unknown_name
from mukv.hub import render
from mukv.hub.settings import read_json

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a message may hold its reasoning; templates read the first or the second."""
MOST_BYTES = 1 << 20
WALL_SECONDS = 20.0
"""A busy machine gives a process its seconds of CPU late."""


def chat_text(folder: Path, messages: Sequence[Mapping[str, Any]]) -> str:
    """The messages (each with `role` and `content`), up to where the model's answer begins.

    folder: where the template is. Raises BadInput if there is none, it can't be rendered within
    seconds and a gigabyte, or it refuses the messages.
    """
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    where, template = find_template(folder, settings)
    values = {
        "messages": [_with_reasoning(message) for message in messages],
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        **special_tokens(folder, settings),
    }
    (answer,) = rendered([template], values, where)
    if "error" in answer:
        given = f"a template that can't be used ({answer['error']})"
        raise BadInput(where, given, "a template that takes these messages")
    return answer["text"]


def rendered(
    templates: Sequence[str], values: Mapping[str, Any], where: str
) -> list[dict[str, str]]:
    """For each template its `text` or its `error`. where: names them in messages.

    Raises BadInput where jinja2 is missing or the work was ended for the time that it took.
    """
    request = json.dumps({"templates": list(templates), "values": values})
    # The allocator's settings ask for more address space than the process may have.
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-P", str(Path(render.__file__))]
    slow = f"a template that takes more than {render.CPU_SECONDS} s"
    try:
        done = subprocess.run(
            command, input=request, capture_output=True, text=True, env=inherited,
            timeout=WALL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BadInput(where, slow, "a template that ends") from None
    if done.returncode < 0:
        raise BadInput(where, slow, "a template that ends")
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise Failed(f"{where}: rendering ended with status {done.returncode}") from None
    if isinstance(found, dict):
        raise BadInput("--chat", where, "needs `pip install 'mukv[hub]'`")
    return found


def special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that a model names, as texts; those that it does not name are absent."""
    path = folder / SPECIAL_TOKENS
    named = {**(read_json(path) if path.exists() else {}), **settings}
    found = {name: _text(named.get(name)) for name in TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def find_template(folder: Path, settings: Mapping[str, Any]) -> tuple[str, str]:
    """The file that holds the template of a folder, and the template. Raises BadInput."""
    path = folder / FILE
    if path.exists():
        try:
            if not path.is_file() or path.stat().st_size > MOST_BYTES:
                raise BadInput(
                    str(path), "no ordinary file", f"text of at most {MOST_BYTES:,} bytes"
                )
            return str(path), path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(str(path), f"a file that can't be read ({error})", "UTF-8") from None
    where = f"{folder / SETTINGS}: chat_template"
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        entries = [each for each in found if isinstance(each, Mapping)]
        names = {str(each.get("name")): each.get("template") for each in entries}
        if "default" not in names:
            raise unknown_name(where, "default", names)
        found = names["default"]
    if found is None:
        allowed = f"a model with a chat template ({FILE}, or in {SETTINGS})"
        raise BadInput("--chat", str(folder), allowed)
    if not isinstance(found, str):
        raise BadInput(where, type(found).__name__, "text, or a list of named templates")
    return where, found


def _with_reasoning(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message whose reasoning stands under the names that templates read."""
    words = next((message[key] for key in REASONING if message.get(key) is not None), None)
    if words is None:
        return dict(message)
    return {"thinking": words, **message, "reasoning_content": words}


def _text(token: Any) -> str | None:
    """A special token is given as its text, or as a mapping with it."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None
