"""`mukv chat`: turns that share one cache, its commands and options, and refused input."""

from __future__ import annotations

import io
import json
import shutil
import signal
from dataclasses import replace

import jax.numpy as jnp
import pytest

import mukv as package
from mukv.cli.chat import _lines, interruptible
from mukv.cli.ending import signals
from mukv.core.errors import BadInput
from mukv.infer import conversation
from mukv.runs import loaded
from mukv.runs.talk import Chat

pytest.importorskip("jinja2")
pytestmark = pytest.mark.xdist_group("trained")

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
FORGETFUL = "{% for m in messages[-1:] %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def folder(trained, tmp_path):
    path = shutil.copytree(trained, tmp_path / "run")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def in_ascii(model):
    """Return the model restricted to ASCII tokens, so that encoding an answer gives its ids."""
    readout = model.weights["readout"]
    kept = jnp.where(jnp.arange(readout.shape[1]) < 128, readout, 0)
    return replace(model, weights={**model.weights, "readout": kept})


@pytest.fixture
def typed(mukv, folder, monkeypatch):
    """Return a function that runs mukv chat with a text as standard input."""

    def run(text, *args):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        return mukv("chat", folder, "--max-tokens", 5, "--length", 256, *args)

    return run


def turns(done):
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_turns_answer_as_one_prefill(folder):
    """Greedy answers equal those after one prefill of the conversation; each turn reads only new
    tokens."""
    model = in_ascii(package.load(folder))
    chat = Chat(model, 256, "Be brief.", max_tokens=9)
    text = "<system>Be brief."
    for number, message in enumerate(("Hello", "Why?", "So?")):
        reply = chat.say(message)
        text += f"<user>{message}<assistant>"
        ids = model.encode_marked(text)[1:]
        made = model.generate_ids([ids], 9)
        assert reply.text == model.tokenizer.decode_further(made.tokens[0])
        assert reply.tokens == 9
        assert not reply.restarted
        assert reply.cache_tokens == len(ids) + 8
        # The last token of the answer, which was not read yet, the message and two marks.
        assert not number or reply.read == len(f".<user>{message}<assistant>")
        text += reply.text


def test_a_template_that_changes_earlier_messages_rebuilds_the_cache(folder, typed):
    (folder / "chat_template.jinja").write_text(FORGETFUL)
    done = typed("Hello\nHello you\n", "--json")
    first, second = turns(done)
    assert (first["restarted"], second["restarted"]) == (False, True)
    assert second["prefill_tokens"] == len("<user>Hello you")
    assert "prefilled again" in done.stderr


@pytest.mark.product
def test_a_pipe(typed):
    made = turns(typed("Hello\n\nWhy?", "--json"))
    assert [turn["role"] for turn in made] == ["assistant"] * 2
    assert [turn["tokens"] for turn in made] == [5, 5]
    needed = {"role", "text", "tokens", "cache_bytes", "prefill_seconds", "tokens_per_second"}
    assert needed <= made[0].keys()
    assert made[0]["cache_bytes"] == made[1]["cache_bytes"] > 0
    plain = typed("Hello\n").stdout
    assert plain == made[0]["text"] + "\n"


@pytest.mark.product
def test_commands(typed):
    hello = turns(typed("Hello\n", "--json"))[0]["text"]
    done = typed("/help\nHello\n/reset\nHello\n/rest\n/stats\n/quit\nHello\n", "--json")
    assert [turn["text"] for turn in turns(done)] == [hello, hello]
    for word in ("/system", "//TEXT", "did you mean '/reset'", "turns: 1", "cache_tokens: "):
        assert word in done.stderr
    slash = turns(typed("//reset\n", "--json"))
    assert len(slash) == 1
    assert "turns: 1\n" in typed("Hello\n/stats\n").stdout


@pytest.mark.product
def test_a_system_prompt(folder, typed):
    given = turns(typed("Hello\n", "--json", "--system", "Be brief."))[0]
    changed = turns(typed("Hi\n/system Be brief.\nHello\n", "--json"))[1]
    assert changed["text"] == given["text"]
    assert given["prefill_tokens"] == len("<system>Be brief.<user>Hello<assistant>")
    (folder / "chat_template.jinja").write_text(NO_SYSTEM + TEMPLATE)
    done = typed("/system Be brief.\nHello\n", "--json")
    assert "no system" in done.stderr
    assert len(turns(done)) == 1


def test_stop_texts(folder, typed):
    whole = Chat(in_ascii(package.load(folder)), 256, max_tokens=9).say("Hello")
    stop = whole.text[4:6]
    out = io.StringIO()
    cut = Chat(in_ascii(package.load(folder)), 256, max_tokens=9, stop=[stop]).say("Hello", out)
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert out.getvalue() == cut.text + "\n"
    assert cut.tokens < whole.tokens


@pytest.mark.product
def test_a_message_that_does_not_fit_changes_nothing(typed):
    done = typed("Hello\n" + "a" * 300 + "\nWhy?\n", "--json")
    assert "conversation" in done.stderr
    assert "/reset" in done.stderr
    plain = turns(typed("Hello\nWhy?\n", "--json"))
    assert [turn["text"] for turn in turns(done)] == [turn["text"] for turn in plain]


def test_ctrl_c_ends_the_answer(folder):
    chat = Chat(package.load(folder), 256, max_tokens=9)
    with interruptible() as pressed:
        signal.raise_signal(signal.SIGINT)
        reply = chat.say("Hello", None, lambda: bool(pressed))
    assert reply.tokens == 1
    assert chat.say("Why?").tokens == 9
    with interruptible():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.product
def test_a_policy_compresses_the_cache(typed):
    full = turns(typed("Hello\nWhy?\n", "--json"))
    kept = turns(typed("Hello\nWhy?\n", "--json", "--policy", "knorm:0.25"))
    assert kept[1]["cache_bytes"] < full[1]["cache_bytes"]
    assert kept[1]["cache_tokens"] == full[1]["cache_tokens"]


@pytest.mark.parametrize(
    ("change", "args", "words"),
    [
        (None, (), ["MODEL", "chat template"]),
        ("{{ 1 / 0 }}", (), ["chat_template.jinja", "ZeroDivision"]),
        (NO_SYSTEM + TEMPLATE, ("--system", "x"), ["chat_template.jinja", "no system"]),
        (TEMPLATE, ("--policy", "knorm:0.001"), ["budget", "at least"]),
        (TEMPLATE, ("--policy", "knorm:0.5+hold"), ["knorm+hold", "without +hold"]),
        (TEMPLATE, ("--policy", "kvzip:0.5"), ["kvzip", "which read a prompt twice"]),
        (TEMPLATE, ("--length", 1 << 30), ["--length", "at most"]),
    ],
)
def test_refused_before_weights_are_read(folder, typed, monkeypatch, change, args, words):
    def fail(*_, **__):
        raise AssertionError("weights were read")

    monkeypatch.setattr(loaded, "load", fail)
    path = folder / "chat_template.jinja"
    path.unlink() if change is None else path.write_text(change)
    done = typed("Hello\n", *args)
    assert done.returncode == 2
    assert [word for word in words if word not in done.stderr] == []
    assert done.stdout == ""


def test_bytes_that_are_not_utf8(typed, mukv, folder, monkeypatch):
    assert typed("\udcff\n").returncode == 2
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\n"), encoding="utf-8"))
    done = mukv("chat", folder)
    assert done.returncode == 2
    assert "UTF-8" in done.stderr


def test_a_model_without_a_folder(folder):
    with pytest.raises(BadInput, match="folder"):
        Chat(replace(package.load(folder), folder=None), 256)


def test_long_messages_are_read_in_pieces(folder, monkeypatch):
    monkeypatch.setattr(conversation, "LONGEST", 16)
    model = in_ascii(package.load(folder))
    chat = Chat(model, 256, max_tokens=4)
    first = chat.say("Hello").text
    second = chat.say("b" * 70).text
    ids = model.encode_marked(f"<user>Hello<assistant>{first}<user>{'b' * 70}<assistant>")[1:]
    made = model.generate_ids([ids], 4).tokens[0]
    assert second == model.tokenizer.decode_further(made)


def test_ctrl_c_at_the_prompt_discards_the_line(monkeypatch):
    """The handler of the command line, which would end the command, is in place again after it."""
    answers = [KeyboardInterrupt, "a line", EOFError]

    def typed(prompt):
        answer = answers.pop(0)
        if answer is KeyboardInterrupt:
            signal.raise_signal(signal.SIGINT)
        if answer is EOFError:
            raise EOFError
        return answer

    monkeypatch.setattr("builtins.input", typed)
    with signals():
        leave = signal.getsignal(signal.SIGINT)
        lines = _lines(terminal=True)
        assert next(lines) == "a line"
        assert signal.getsignal(signal.SIGINT) is leave
        assert list(lines) == []
