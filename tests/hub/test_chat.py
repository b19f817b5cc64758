"""Chat templates give the text that transformers gives, and can't harm."""

from __future__ import annotations

import json
import os
import signal

import pytest

from mukv.core.errors import BadInput
from mukv.hub.chat import chat_text, rendered

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
)


@pytest.fixture(scope="module")
def theirs():
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models

    inner = Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a"))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>"
    )


def test_as_transformers(theirs):
    """Text or refusal, for every template and conversation."""
    values = {"tools": None, "documents": None, "add_generation_prompt": True}
    values |= {"bos_token": "<s>", "eos_token": "</s>"}
    compared = 0
    for messages in CONVERSATIONS:
        from mukv.hub.chat import _with_reasoning

        mine = {**values, "messages": list(map(_with_reasoning, messages))}
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


@pytest.mark.parametrize("place", ["file", "text", "list"])
def test_where_a_template_is(tmp_path, place):
    template, settings = "{{ bos_token }}{{ messages[0].content }}", dict(SETTINGS)
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(template)
        settings["chat_template"] = "{{ 'the file wins' }}"
    elif place == "text":
        settings["chat_template"] = template
    else:
        settings["chat_template"] = [
            {"name": "tool_use", "template": "tools"},
            {"name": "default", "template": template},
        ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert chat_text(tmp_path, [{"role": "user", "content": "hi"}]) == "<s>hi"


def test_special_tokens_have_a_file_of_their_own(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ cls_token }}")
    (tmp_path / "special_tokens_map.json").write_text('{"bos_token": "<a>", "cls_token": "<c>"}')
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<b>"}')
    assert chat_text(tmp_path, []) == "<b><c>"


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


@pytest.mark.parametrize("template", HOSTILE)
def test_hostile_templates_are_one_line(tmp_path, template):
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(BadInput) as refused:
        chat_text(tmp_path, [{"role": "user", "content": "hi"}])
    message = str(refused.value)
    assert HOSTILE[template] in message
    assert "chat_template.jinja" in message
    assert "\n" not in message
    assert len(message) < 500


def test_an_endless_template_is_ended(tmp_path):
    loops = "".join(f"{{% for i{n} in range(99999) %}}" for n in range(4))
    (tmp_path / "chat_template.jinja").write_text(loops + "{% endfor %}" * 4)
    with pytest.raises(BadInput, match="more than 5 s"):
        chat_text(tmp_path, [])


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
            chat_text(tmp_path, [])
    finally:
        signal.alarm(0)
