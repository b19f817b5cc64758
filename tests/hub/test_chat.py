"""Chat templates give the text that transformers gives, and can't do harm."""

from __future__ import annotations

import json
import os
import signal

import pytest

from mukv.core.errors import BadInput
from mukv.hub import render
from mukv.hub.chat import _given, chat_text, rendered, special_tokens
from tests.pairs import params

BOS = {"content": "<s>", "lstrip": False}
SETTINGS = {"bos_token": BOS, "eos_token": "</s>", "pad_token": None}
TEMPLATES = (
    "{{ messages[0] | tojson(separators=(',', ':')) }}",
    "{{ messages[0] | tojson(ensure_ascii=False) }}",
    "{{ messages[0] | tojson(ensure_ascii=True, indent=2) }}",
    "{{ messages[0] | tojson(sort_keys=true) }}",
    "{% if tools is not none %}You have tools. {% endif %}{{ messages[0].content }}",
    "{% if documents is none %}{{ messages[0].content }}{% endif %}",
    "{{ bos_token }}{{ eos_token }}{{ pad_token is defined }}{{ unk_token is defined }}",
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content | trim }}{% endif %}{% endfor %}",
    "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{% if m.role == 'user' %}{% continue %}{% endif %}{{ m.role }}"
    "{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}",
    "{% if messages[0]['role'] == 'system' %}\n    {% set rest = messages[1:] %}\n"
    "{% else %}\n    {% set rest = messages %}\n{% endif %}\n{{ rest | length }}\n",
    "  {%- for m in messages -%}\n<|{{ m['role'] }}|>\n{{ m['content'] }}\n{%- endfor %}\n"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}",
    "{% macro say(x) %}[{{ x }}]{% endmacro %}{% for m in messages %}{{ say(m.role) }}{% endfor %}",
    "{{ messages | map(attribute='role') | join(',') }} {{ messages[-1].content | upper }}",
    "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    "{{ strftime_now('%Y') | length }}{{ strftime_now is defined }}",
    "{% if messages[0].content is string %}s{% else %}{{ messages[0].content[0].text }}{% endif %}",
    "{{ dict(a=1) | tojson }}{{ 'é\u2028<&>' | tojson }}{{ 'a' ~ 1 ~ none }}",
    "{% raw %}{{ x }}{% endraw %}{# a note #}{{ messages[0].get('name', 'nobody') }}",
    "{% filter upper %}abc{% endfilter %}{{ range(3) | list }}{{ cycler is defined }}{{ loop }}",
    "{{ messages[0].reasoning_content }}|{{ messages[0].thinking }}",
    "{{ raise_exception('roles must alternate') if messages | length == 3 else 'ok' }}",
    "{{ messages[0].get('tool_calls') }}{{ messages[0].name is defined }}",
    "{{ messages[0] | tojson }}",
    "{% set ns = namespace(_a=1) %}x",
    "{% set ns = namespace(a=1) %}{% set ns._a = 2 %}x",
    "{% set ns = namespace({'__x': 1}) %}x",
    "{% set ns = namespace({'a': 1}, self=2) %}{{ ns.a }}{{ ns.self }}{{ ns._b is defined }}",
    "{{ dict.fromkeys('ab', 1) }}{{ dict(a=1) }}{{ dict.mro is defined }}{{ dict is mapping }}",
    "{{ namespace.mro is defined }}{{ dict.__class__ }}",
    "{{ messages[7].content }}{{ missing }}{{ missing.deeper if missing is defined }}",
)
CONVERSATIONS = (
    [{"role": "user", "content": "h\u00e9 <b>"}],
    [{"role": "system", "content": " be brief "}, {"role": "user", "content": "hi\n"}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "yes", "reasoning": "hm"},
        {"role": "user", "content": "why?"},
    ],
    [{"role": "user", "content": [{"type": "text", "text": "parts"}], "name": "me"}],
    [{"role": "assistant", "content": "x", "thinking": "t"}],
    [{"role": "assistant", "content": None, "tool_calls": None, "name": None, "reasoning": "r"}],
    [{"role": "user", "content": {"text": None}, "thinking": None, "reasoning": "r"}],
)


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )


def test_templates_are_those_of_transformers(theirs):
    """Each template gives the text of transformers, or an error where it gives one."""
    values = {"tools": None, "documents": None, "add_generation_prompt": True}
    values |= {"bos_token": "<s>", "eos_token": "</s>"}
    compared = 0
    for messages in CONVERSATIONS:
        mine = {**values, "messages": list(map(_given, messages))}
        for template, answer in zip(TEMPLATES, rendered(TEMPLATES, mine, "t"), strict=True):
            try:
                expected = theirs.apply_chat_template(
                    messages, chat_template=template, tokenize=False, add_generation_prompt=True
                )
            except Exception:
                assert "error" in answer, (template, answer)
            else:
                assert answer.get("text") == expected, (template, answer)
            compared += 1
    assert compared == len(TEMPLATES) * len(CONVERSATIONS)


@pytest.mark.parametrize("place", ["file", "text", "list", "mapping"])
def test_files_in_which_a_template_is_found(tmp_path, place):
    template, settings = "{{ bos_token }}{{ messages[0].content }}", dict(SETTINGS)
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
        settings["chat_template"] = "{{ 'the file wins' }}"
    elif place == "text":
        settings["chat_template"] = template
    elif place == "mapping":
        settings["chat_template"] = {"tool_use": "tools", "default": template}
    else:
        settings["chat_template"] = [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": template},
        ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat_text(tmp_path, [{"role": "user", "content": "hi"}]) == "<s>hi"


MARK = {
    "content": "<m>",
    "lstrip": False,
    "rstrip": False,
    "normalized": False,
    "single_word": False,
}
TYPED = MARK | {"__type": "AddedToken"}
LISTED = {"added_tokens_decoder": {"1": MARK | {"content": "<s>", "special": True}}}
OWN = {"image_token": "<i>", "boi": "<x>"}


@pytest.mark.product
@pytest.mark.parametrize(
    ("settings", "mapped", "right"),
    [
        ({"bos_token": "<s>"}, {"bos_token": "<m>"}, {"bos_token": "<m>"}),
        ({"bos_token": "<s>"}, {"cls_token": MARK}, {"bos_token": "<s>", "cls_token": "<m>"}),
        ({"bos_token": "<s>"} | LISTED, {"bos_token": "<m>"}, {"bos_token": "<s>"}),
        ({"bos_token": "<s>"} | LISTED, {"cls_token": "<c>"}, {"bos_token": "<s>"}),
        ({"bos_token": None}, {"bos_token": "<m>"}, {"bos_token": "<m>"}),
        ({"bos_token": "<s>"}, {"bos_token": None}, {}),
        ({"bos_token": TYPED}, None, {"bos_token": "<m>"}),
        ({"image_token": "<i>"}, {"image_token": "<x>"}, {"image_token": "<i>"}),
        ({"image_token": "<i>"}, {"image_token": None}, {"image_token": "<i>"}),
        ({}, {"image_token": MARK}, {"image_token": "<m>"}),
        ({"image_token": TYPED}, None, {"image_token": "<m>"}),
        ({"image_token": 3, "audio_token": MARK}, None, {}),
        ({"extra_special_tokens": OWN}, None, OWN),
        ({}, {"extra_special_tokens": OWN}, OWN),
        ({"image_token": "<y>"}, {"extra_special_tokens": OWN}, OWN),
        ({"image_token": "<y>", "extra_special_tokens": OWN}, None, OWN),
        ({"image_token": "<i>"} | LISTED, {"image_token": "<x>"}, {"image_token": "<i>"}),
        ({"model_specific_special_tokens": OWN}, None, OWN),
        ({"model_specific_special_tokens": OWN, "a_token": "<s>"}, None, {"a_token": "<s>"}),
        ({"additional_special_tokens": ["<x>"], "add_bos_token": True}, {"foo": "<x>"}, {}),
    ],
)  # fmt: skip
def test_special_tokens_as_transformers(settings, mapped, right, theirs, tmp_path):
    theirs.backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    if mapped is not None:
        (tmp_path / "special_tokens_map.json").write_text(json.dumps(mapped))
    assert special_tokens(tmp_path, settings) == right
    assert type(theirs).from_pretrained(tmp_path).special_tokens_map == right
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ image_token }}{{ boi }}")
    text = chat_text(tmp_path, [{"role": "user", "content": "hi"}])
    assert text == "".join(right.get(name, "") for name in ("bos_token", "image_token", "boi"))


def test_a_special_token_can_not_stand_for_the_messages(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    settings = {"extra_special_tokens": {"messages": "<x>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat_text(tmp_path, [{"role": "user", "content": "hi"}]) == "hi"


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "at least one"),
        (["hi"], "mapping"),
        ([{"role": "user", "content": "a\ud800"}], r"\[0\].content: .*lone surrogates"),
        ([{"role": "user", "content": [{"text": "\udfff"}]}], "lone surrogates"),
    ],
)
def test_invalid_messages_are_refused(tmp_path, messages, words):
    (tmp_path / "chat_template.jinja").write_text("x")
    with pytest.raises(BadInput, match=f"^messages.*{words}"):
        chat_text(tmp_path, messages)


def test_images_are_seen_by_the_name_of_their_type(theirs, tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content[0].image }}")
    messages = [{"role": "user", "content": [{"image": object()}]}]
    expected = theirs.apply_chat_template(
        messages, chat_template="{{ messages[0].content[0].image }}", tokenize=False
    )
    assert chat_text(tmp_path, messages) == expected == "<object>"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("SIGXCPU", "takes more than 5 s"),
        ("SIGKILL", "ended by SIGKILL.*memory"),
        ("SIGABRT", "ended by SIGABRT.*memory"),
        ("SIGSEGV", "ended by SIGSEGV.*jinja2 can render"),
    ],
)
def test_the_end_of_rendering_is_reported(name, words, monkeypatch, tmp_path):
    script = tmp_path / "dies.py"
    script.write_text(f"import os, signal\nos.kill(os.getpid(), signal.{name})\n")
    monkeypatch.setattr(render, "__file__", str(script))
    with pytest.raises(BadInput, match=f"^t: .*{words}"):
        rendered(["x"], {}, "t")


HOSTILE = {
    "{{ 1/0 }}": "division by zero",
    "{% include '/etc/passwd' %}": "loader",
    "{% import '/etc/passwd' as x %}": "loader",
    "{% extends 'base' %}": "loader",
    "{{ 'a'*(10**10) }}": "memory",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{{ '\\ud800' }}": "surrogates",
    "{{ messages.append|tojson }}": "TypeError",
    "{{ 'a'+1 }}": "TypeError",
    "{{ raise_exception('no system role') }}": "no system role",
    "{% for": "TemplateSyntaxError",
    "{{ messages.__class__.__mro__ }}": "SecurityError",
    "{{ 'x' | nosuchfilter }}": "nosuchfilter",
    "{{ '%1000000000d' % 1 }}": "",
    "{{ ''.join(['ab' * 10000] * 10000) }}": "",
    "{{ ('a' * 3000000) }}": "characters",
    "{{ 'x' | indent(10**10) }}": "",
    "{{ [1] * 10**10 }}": "memory",
    "{{ messages[0].content.append(1) }}": "",
    "{% set messages = 3 %}{{ messages[0]['a'] + messages }}": "",
}


ENDED = ["{{ '%1000000000d' % 1 }}", "{{ ''.join(['ab' * 10000] * 10000) }}"]
"""Templates that run until the limit of time."""


@pytest.mark.parametrize(
    "template", params(HOSTILE, [each for each in HOSTILE if each not in ENDED])
)
def test_hostile_templates_are_one_line(tmp_path, template):
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(BadInput) as refused:
        chat_text(tmp_path, [{"role": "user", "content": "hi"}])
    message = str(refused.value)
    assert HOSTILE[template] in message
    assert "chat_template.jinja" in message
    assert "\n" not in message
    assert len(message) < 500


@pytest.mark.product
def test_an_endless_template_is_ended(tmp_path):
    loops = "".join(f"{{% for i{n} in range(99999) %}}" for n in range(4))
    (tmp_path / "chat_template.jinja").write_text(loops + "{% endfor %}" * 4)
    with pytest.raises(BadInput, match=r"more than \d+ s"):
        chat_text(tmp_path, [{"role": "user", "content": "hi"}])


@pytest.mark.parametrize("kind", ["folder", "fifo", "binary", "long", "number", "no default"])
def test_files_that_hold_no_template(tmp_path, kind):
    path, settings = tmp_path / "chat_template.jinja", {}
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "binary":
        path.write_bytes(b"\xff\xfe")
    elif kind == "long":
        path.write_text("a" * (1 << 21))
    elif kind == "number":
        settings = {"chat_template": 3}
    else:
        settings = {"chat_template": [{"name": "rag", "template": "x"}, 3]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    signal.alarm(10)
    try:
        with pytest.raises(BadInput, match=r"chat_template|--chat"):
            chat_text(tmp_path, [{"role": "user", "content": "hi"}])
    finally:
        signal.alarm(0)
