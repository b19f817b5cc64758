"""Conversations as token files: only the assistant's answers are learned."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from mukv.core.errors import BadInput
from mukv.data.batches import Batches
from mukv.data.build import build_tokens
from mukv.data.sources import Messages
from mukv.data.text import TextPiece
from mukv.data.tokenizer import ByteTokenizer
from mukv.data.tokens import open_tokens
from mukv.hub.turns import turns
from mukv.runs.chats import Conversations
from mukv.runs.located import Located

TEMPLATE = (
    "{% for m in messages %}<|begin|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant: {% endif %}"
)
BEGIN = 256


def conversation(number):
    """Return two questions and answers; the answers alone have digits."""
    messages = [{"role": "system", "content": "cöunt"}] if number % 3 == 0 else []
    for turn in range(1 + number % 2):
        messages += [
            {"role": "user", "content": "how many" + "?" * (number % 5)},
            {"role": "assistant", "content": f"{number}{turn}" * (1 + number % 4)},
        ]
    return messages


@pytest.fixture(scope="module")
def encode(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return Conversations(Located("model", None, folder, None), ByteTokenizer())


@pytest.fixture(scope="module")
def chats(tmp_path_factory):
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"messages": conversation(number)} for number in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def corpus(chats, encode, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "t"
    given = [str(chats)], out, encode.tokenizer, Messages("messages")
    return build_tokens(*given, validation=0.2, encode=encode)


def test_turns_are_the_conversation(encode):
    (split,) = turns(encode.found.folder, [conversation(1)])
    assert [turn.learned for turn in split] == [False, True, False, True]
    assert split[0].text == "<|begin|>user: how many?\n<|begin|>assistant: "
    assert split[1].text == "1010\n"
    whole = "".join(turn.text for turn in split)
    assert whole.count("<|begin|>") == 4
    assert whole.endswith("1111\n")


def test_only_answers_are_learned(corpus):
    """The digits of the answers and the line end that closes each of them, in both splits."""
    for name in ("train", "validation"):
        stream = corpus.split(name)
        text = bytes(np.where(stream.tokens < BEGIN, stream.tokens, ord("|")).astype(np.uint8))
        assert "|system: cöunt\n|user: how many" in text.decode()
        digits = np.isin(stream.tokens, list(b"0123456789"))
        closing = np.append(False, digits[:-1]) & (stream.tokens == ord("\n"))
        np.testing.assert_array_equal(stream.learned.astype(bool), digits | closing)


@pytest.mark.parametrize("packing", ["packed", "contiguous"])
def test_weights_are_those_of_the_file(corpus, packing):
    """Every learned token but the first of a document is a target once per epoch, wherever windows
    are cut; a batch is a function of its step."""
    batches = Batches(corpus, 0, 4, 7, packing=packing)
    weights, targets = 0, []
    for step in range(-(-batches.windows // 4)):
        batch = batches.at(step)
        np.testing.assert_array_equal(batch.weight, Batches(corpus, 0, 4, 7).at(step).weight)
        if (step + 1) * 4 <= batches.windows:
            weights += batch.weight.sum()
            targets += batch.targets[batch.weight > 0].tolist()
    assert set(targets) <= {*b"0123456789\n"}
    once = sum(batch.weight.sum() for batch in batches.once())
    assert once == corpus.train.learned.sum()
    assert weights <= once


def test_the_end_of_the_only_split_has_its_mask(chats, encode, tmp_path):
    """A corpus of few conversations, all of which fall into one split, is cut with its mask."""
    chats = tmp_path / "one.jsonl"
    chats.write_text(json.dumps({"talk": conversation(7)}) + "\n")
    given = [str(chats)], tmp_path / "t", encode.tokenizer, Messages("talk")
    found = build_tokens(*given, validation=0.3, encode=encode)
    assert found.train.tokens[0] == BEGIN
    for stream in (found.train, found.validation):
        assert len(stream.learned) == len(stream.tokens)
    whole = np.concatenate([found.train.tokens, found.validation.tokens])
    learned = np.concatenate([found.train.learned, found.validation.learned])
    assert set(whole[learned == 1].tolist()) == {*b"701\n"}


def test_the_fingerprint_covers_the_mask(chats, encode, tmp_path):
    given = [str(chats)], tmp_path / "t", encode.tokenizer, Messages("messages")
    first = build_tokens(*given, validation=0.2, encode=encode)
    path = tmp_path / "t" / "train.learned"
    path.write_bytes(b"\1" * path.stat().st_size)
    with pytest.raises(BadInput, match="a changed token file"):
        open_tokens(first.path).require_unchanged()
    path.write_bytes(b"\1")
    with pytest.raises(BadInput, match=r"train\.learned: got .1 bytes"):
        open_tokens(first.path)


def pieces(*messages, **changes):
    return [TextPiece("a:1", json.dumps(each).encode(), True, **changes) for each in messages]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "x"}], "messages: got .*a role assistant that answers"),
        ([{"role": "assistant", "content": "x"}], "a role assistant that answers another"),
        ([], "a role assistant"),
    ],
)
def test_conversations_without_answers_are_refused(encode, messages, message):
    with pytest.raises(BadInput, match=message):
        encode(pieces(messages))


def test_other_bad_input(encode, tmp_path):
    with pytest.raises(BadInput, match="a:1: got 'a longer one'; a conversation of at most 1 MiB"):
        encode(pieces(conversation(1), long=True))
    changing = "{% for m in messages %}{{ messages | length }}{{ m.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(changing)
    other = replace(encode, found=replace(encode.found, folder=tmp_path))
    with pytest.raises(BadInput, match="changes earlier turns"):
        other(pieces(conversation(1)))
    path = tmp_path / "x.jsonl"
    path.write_text('{"messages": "hello"}\n{"messages": ["hello"]}\n')
    with pytest.raises(BadInput, match=r"x\.jsonl:1: messages.*a list of mappings"):
        build_tokens(
            [str(path)], tmp_path / "t", encode.tokenizer, Messages("messages"), encode=encode
        )


def test_the_command_refuses_a_second_tokenizer(mukv, tmp_path):
    done = mukv("data", "x.jsonl", "--chat", "m", "--tokenizer", "bpe:300", "--out", tmp_path / "t")
    assert done.returncode == 2
    assert "--tokenizer: got 'bpe:300'; not with --chat" in done.stderr
