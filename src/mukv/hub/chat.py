"""Chat templates: format a conversation as the text that a model was trained to continue.

A template comes with the model, as chat_template.jinja or in tokenizer_config.json. jinja2 renders
it in a sandbox, in a separate process (see render.py), with the names that transformers provides to
templates.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mukv.core.arguments import require_text
from mukv.core.errors import BadInput, Failed, unknown_name
from mukv.hub import render
from mukv.hub.settings import read_json

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
SPECIAL_TOKENS = "special_tokens_map.json"
TOKENS = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
ADDED = "AddedToken"
"""The `__type` of a special token that is a mapping in tokenizer_config.json."""
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Keys under which a message may have its reasoning; templates read one of the first two."""
MOST_BYTES = 1 << 20
WALL_SECONDS = 20.0
"""Time limit of rendering; on a busy machine a process takes longer than its CPU time."""


def chat_text(folder: Path, messages: Sequence[Mapping[str, Any]]) -> str:
    """Format messages (each with `role` and `content`) as the text that the model's answer follows.

    folder: folder with the template

    Keys of a message whose value is None are left out. Raises BadInput if there is no template or
    no message, if rendering exceeds its limits of time and RAM, and if the template refuses the
    messages.
    """
    return chat_texts(folder, [(messages, True)])[0]


def chat_texts(
    folder: Path, asked: Sequence[tuple[Sequence[Mapping[str, Any]], bool]]
) -> list[str]:
    """Format several lists of messages at once.

    asked: messages, and whether the model's answer follows, so that the text ends where it begins

    Raises BadInput as `chat_text` does.
    """
    for messages, _ in asked:
        if not messages or not all(isinstance(message, Mapping) for message in messages):
            raise BadInput("messages", messages, "at least one mapping with `role` and `content`")
        require_text("messages", messages)
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    where, template = find_template(folder, settings)
    values = {**special_tokens(folder, settings), "tools": None, "documents": None}
    own = [
        {"messages": list(map(_given, messages)), "add_generation_prompt": follows}
        for messages, follows in asked
    ]
    texts = []
    for answer in rendered([template] * len(own), values, where, own):
        if "error" in answer:
            given = f"a template that can't be used ({answer['error']})"
            raise BadInput(where, given, "a template that takes these messages")
        texts.append(answer["text"])
    return texts


def rendered(
    templates: Sequence[str],
    values: Mapping[str, Any],
    where: str,
    own: Sequence[Mapping[str, Any]] | None = None,
) -> list[dict[str, str]]:
    """Render templates in a separate process; return the `text` or the `error` of each.

    where: name of the templates in errors
    own: values of each template beside those of all; None for none

    Raises BadInput if jinja2 is missing, and if the process exceeded its limits of time or RAM.
    """
    each = [{}] * len(templates) if own is None else own
    request = {"templates": list(zip(templates, each, strict=True)), "values": values}
    # As in transformers, templates receive the name of the type of an image or an array.
    text = json.dumps(request, default=lambda value: f"<{type(value).__name__}>")
    # The allocator's settings need more address space than the process may have.
    inherited = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    command = [sys.executable, "-P", str(Path(render.__file__))]
    try:
        done = subprocess.run(
            command, input=text, capture_output=True, text=True, env=inherited,
            timeout=WALL_SECONDS, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        slow = f"a template that takes more than {WALL_SECONDS:g} s"
        raise BadInput(where, slow, "a template that ends") from None
    if done.returncode < 0:
        raise _death(where, -done.returncode)
    try:
        found = json.loads(done.stdout)
    except ValueError:
        raise Failed(f"{where}: rendering ended with status {done.returncode}") from None
    if isinstance(found, dict):
        raise BadInput("--chat", where, "needs `pip install 'mukv[hub]'`")
    return found


def _death(where: str, number: int) -> BadInput:
    """Make the error for a rendering process that a signal ended."""
    if number == signal.SIGXCPU:
        slow = f"a template that takes more than {render.CPU_SECONDS} s"
        return BadInput(where, slow, "a template that ends")
    names = {each.value: each.name for each in signal.Signals}
    given = f"a template whose rendering was ended by {names.get(number, f'signal {number}')}"
    if number in (signal.SIGKILL, signal.SIGABRT):  # by the system, or after a failed allocation
        return BadInput(where, given, "there may be too little memory")
    return BadInput(where, given, "a template that jinja2 can render")


def special_tokens(folder: Path, settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the texts of the special tokens that a model names.

    settings: content of tokenizer_config.json

    Values of special_tokens_map.json, null included, override those of `settings`. The file is
    ignored if the settings have `added_tokens_decoder` (transformers 5,
    `PreTrainedTokenizerBase._from_pretrained`). For names that only some models have, such as
    `image_token`, the settings override the file.
    """
    named = dict(settings)
    own = {key: named.pop(key) for key in list(named) if _is_own(key, named[key], (str,))}
    own |= _mapping(named.pop("extra_special_tokens", None))
    own = own or _mapping(named.pop("model_specific_special_tokens", None))
    path = folder / SPECIAL_TOKENS
    if "added_tokens_decoder" not in settings and path.exists():
        mapped = read_json(path)
        named |= {
            key: value | {"__type": ADDED} if isinstance(value, dict) else value
            for key, value in mapped.items()
        }
        own |= _mapping(mapped.get("extra_special_tokens"))
    found = {key: named[key] for key in named if key in TOKENS or _is_own(key, named[key])} | own
    texts = {name: _text(value) for name, value in found.items()}
    return {name: text for name, text in texts.items() if text is not None}


def _is_own(key: str, value: Any, kinds: tuple[type, ...] = (str, dict)) -> bool:
    """Whether a key names a special token that only some models have."""
    known = isinstance(value, kinds) and (isinstance(value, str) or value.get("__type") == ADDED)
    return key.endswith("_token") and key not in TOKENS and known


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def has_template(folder: Path) -> bool:
    """Whether a folder has a chat template, in a file of its own or among its settings."""
    if (folder / FILE).exists():
        return True
    path = folder / SETTINGS
    return path.exists() and read_json(path).get("chat_template") is not None


def find_template(folder: Path, settings: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of the file with a folder's template, and the template. Raises BadInput if
    there is none, or it can't be read."""
    path = folder / FILE
    if path.exists():
        try:
            if not path.is_file() or path.stat().st_size > MOST_BYTES:
                raise BadInput(
                    str(path), "not a regular file", f"text of at most {MOST_BYTES:,} bytes"
                )
            return str(path), path.read_bytes().decode()
        except (OSError, UnicodeDecodeError) as error:
            raise BadInput(str(path), f"a file that can't be read ({error})", "UTF-8") from None
    where = f"{folder / SETTINGS}: chat_template"
    found = settings.get("chat_template")
    if isinstance(found, list | dict):  # several, by name
        names = _mapping(found) or {
            str(each.get("name")): each.get("template")
            for each in found
            if isinstance(each, Mapping)
        }
        if "default" not in names:
            raise unknown_name(where, "default", names)
        found = names["default"]
    if found is None:
        allowed = f"a model with a chat template ({FILE}, or in {SETTINGS})"
        raise BadInput("--chat", str(folder), allowed)
    if not isinstance(found, str):
        raise BadInput(where, type(found).__name__, "text, or templates by name")
    return where, found


def _given(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message for templates, with its reasoning under all names that they read."""
    kept = {key: value for key, value in message.items() if value is not None}
    words = next((kept[key] for key in REASONING if key in kept), None)
    return kept if words is None else {"thinking": words, **kept, "reasoning_content": words}


def _text(token: Any) -> str | None:
    """Return the text of a special token, which is a string or a mapping with it."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else None
