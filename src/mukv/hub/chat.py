"""Chat templates: a conversation as the text that a model was trained to answer.

A template comes with the model, as chat_template.jinja or in tokenizer_config.json, and is
rendered by jinja2 in a sandbox, with the names that Hugging Face gives it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from mukv.core.errors import BadInput
from mukv.hub.settings import read_json

FILE, SETTINGS = "chat_template.jinja", "tokenizer_config.json"
TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def chat_text(folder: Path, messages: Sequence[Mapping[str, str]]) -> str:
    """The messages (each with `role` and `content`), up to where the model's answer begins.

    folder: where the template is. Raises BadInput if there is none, or it refuses the messages.
    """
    settings = read_json(folder / SETTINGS) if (folder / SETTINGS).exists() else {}
    template = _template(folder, settings)
    try:
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment
    except ImportError:
        raise BadInput("--chat", str(folder), "needs `pip install 'mukv[hub]'`") from None

    def refuse(message: str) -> NoReturn:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:
        return json.dumps(value, ensure_ascii=False, indent=indent)

    world = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    world.filters["tojson"] = to_json
    world.globals |= {"raise_exception": refuse, "strftime_now": time.strftime}
    names = {name: _text(settings.get(name)) for name in TOKENS}
    try:
        return world.from_string(template).render(
            messages=[dict(message) for message in messages], add_generation_prompt=True, **names
        )
    except TemplateError as error:
        given = f"a template that can't be used ({error})"
        raise BadInput(str(folder), given, "messages that it knows") from None


def _template(folder: Path, settings: Mapping[str, Any]) -> str:
    if (folder / FILE).exists():
        return (folder / FILE).read_text("utf-8")
    found = settings.get("chat_template")
    if isinstance(found, list):  # several, by name
        found = {each.get("name"): each.get("template") for each in found}.get("default")
    if not isinstance(found, str):
        allowed = f"a model with a chat template ({FILE}, or in {SETTINGS})"
        raise BadInput("--chat", str(folder), allowed)
    return found


def _text(token: Any) -> str:
    """A special token is given as its text, or as a mapping with it."""
    found = token.get("content") if isinstance(token, Mapping) else token
    return found if isinstance(found, str) else ""
