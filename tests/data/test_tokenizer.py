"""Tokenizers: ids stand for bytes, and files round-trip."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mukv.core.errors import BadInput
from mukv.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    load_tokenizer,
    parse_tokenizer,
    train_bpe,
)

BYTES = ByteTokenizer()
BPE = train_bpe(["the cat and the dog and the hat"] * 20, 300)


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
@given(text=st.text() | st.just("a<|begin|>b"))
def test_decoding_undoes_encoding(tokenizer: JsonTokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.start[0] not in ids


@given(st.text())
def test_bytes_are_what_their_file_says(text: str):
    found = BYTES.inner.encode(text, add_special_tokens=False).ids
    assert found == list(text.encode()) == BYTES.encode(text).tolist()


def test_sizes():
    assert (BYTES.vocab_size, BYTES.start, BYTES.token_bytes()[255:].tolist()) == (
        257,
        (256,),
        [1, 0],
    )
    assert BPE.vocab_size == len(BPE.inner.get_vocab()) <= 300
    assert len(BPE.encode("the cat and the dog")) < 8
    assert BYTES.token_bytes(300).tolist() == [1] * 256 + [0] * 44
    assert (BYTES.token_data(-1), BYTES.token_data(256), BYTES.token_data(999)) == (b"",) * 3
    with pytest.raises(BadInput, match="257"):
        BYTES.token_bytes(256)
    with pytest.raises(BadInput, match="257"):
        train_bpe(["a"], 256)


def test_training_is_reproducible():
    assert train_bpe(["the cat and the dog and the hat"] * 20, 300) == BPE


@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
def test_files_round_trip(tokenizer: JsonTokenizer, tmp_path: Path):
    tokenizer.save(tmp_path / "tokenizer.json")
    assert load_tokenizer(tmp_path) == load_tokenizer(tmp_path / "tokenizer.json") == tokenizer
    others = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert others.encode("the cat").ids == [*tokenizer.start, *tokenizer.encode("the cat").tolist()]
    assert others.decode(tokenizer.encode("é the cat").tolist()) == "é the cat"


def test_sentence_piece_with_byte_fallback():
    words = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a"]
    inner = Tokenizer(
        models.BPE({w: i for i, w in enumerate(words)}, [("▁", "a")], byte_fallback=True)
    )
    inner.normalizer = normalizers.Replace(" ", "▁")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer = JsonTokenizer(inner.to_str())
    ids = tokenizer.encode("b aé\n")
    assert tokenizer.start == ()
    assert ids.tolist() == [259, 260, 1 + 0xC3, 1 + 0xA9, 1 + 0x0A]
    assert tokenizer.decode(ids.tolist()) == inner.decode(ids.tolist()) == "b aé\n"
    assert tokenizer.token_bytes()[ids].tolist() == [1, 2, 1, 1, 1]


def test_other_kinds_decode_word_by_word():
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = JsonTokenizer(inner.to_str())
    assert tokenizer.encode("one two one").tolist() == [1, 0, 1]
    assert tokenizer.token_data(1) == b"one"


@given(st.text() | st.sampled_from(["{}", "[]", "null", BYTES.content[:900]]))
def test_foreign_files_are_refused(content: str):
    with pytest.raises(BadInput, match="here"):
        parse_tokenizer(content, "here")


def test_missing_files_are_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="No such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    with pytest.raises(BadInput, match="UTF-8"):
        load_tokenizer(tmp_path)


def word_level(**changes):
    """The tree of a small tokenizer.json with a template around a text."""
    words = {word: i for i, word in enumerate(["[UNK]", "a", "b", "<s>", "</s>"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "</s>"])
    return json.loads(inner.to_str()) | changes


def template(single):
    names = [("<s>", 3), ("</s>", 4)]
    return json.loads(
        processors.TemplateProcessing(single=single, special_tokens=names).__getstate__()
    )


BERT = {"type": "BertProcessing", "sep": ["</s>", 4], "cls": ["<s>", 3]}
ROBERTA = {**BERT, "type": "RobertaProcessing", "trim_offsets": True, "add_prefix_space": False}


@pytest.mark.parametrize(
    ("processor", "start"),
    [
        (None, ()),
        (template("$A"), ()),
        (template("$A </s>"), ()),
        (template("<s> $A"), (3,)),
        (template("<s> $A </s>"), (3,)),
        (template("<s> </s> $A </s>"), (3, 4)),
        (BERT, (3,)),
        (ROBERTA, (3,)),
        ({"type": "Sequence", "processors": [template("<s> $A </s>")]}, (3,)),
    ],
)
def test_a_text_begins_with_what_stands_before_it(processor, start):
    tokenizer = JsonTokenizer(json.dumps(word_level(post_processor=processor)))
    assert tokenizer.start == start
    theirs = Tokenizer.from_str(tokenizer.content).encode("a b").ids
    assert [*start, *tokenizer.encode("a b").tolist()] == theirs[: len(start) + 2]


def test_truncation_and_padding_of_the_last_use_are_ignored():
    stored = {
        "truncation": {
            "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
        },
        "padding": {
            "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
            "pad_id": 0, "pad_type_id": 0, "pad_token": "[UNK]",
        },
    }  # fmt: skip
    plain, used = (JsonTokenizer(json.dumps(word_level(**more))) for more in ({}, stored))
    assert used.encode("a b a").tolist() == plain.encode("a b a").tolist() == [1, 2, 1]
    assert used.encode_marked("<s> a b a") == plain.encode_marked("<s> a b a") == [3, 1, 2, 1]
    assert used.start == plain.start


def test_added_tokens_are_spelled_by_the_decoder():
    """Gemma lists runs of spaces among its added tokens; their text is that of the vocabulary."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"\u2581" * 4: 256, "\u2581": 257}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True))
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tree = json.loads(inner.to_str())
    tree["added_tokens"] = [
        {
            "id": 256, "content": "\u2581" * 4, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": False,
        }
    ]  # fmt: skip
    tokenizer, text = JsonTokenizer(json.dumps(tree)), "if x:\n    y"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text == tokenizer.inner.decode(ids.tolist())
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.token_data(256) == b"    "


def test_a_special_token_that_no_text_has_asks_for_no_embedding():
    tree = word_level()
    # The library numbers an added token after the vocabulary's last.
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 5, "content": "<image>"})
    tokenizer = JsonTokenizer(json.dumps(tree))
    assert (tokenizer.vocab_size, tokenizer.text_vocab_size) == (6, 3)
    assert tokenizer.token_bytes(5).tolist() == [5, 1, 1, 0, 0]
    tree["post_processor"] = template("<s> $A </s>")
    assert JsonTokenizer(json.dumps(tree)).text_vocab_size == 4
    # One that a text can have does.
    tree["added_tokens"][-1]["special"] = False
    with pytest.raises(BadInput, match="vocab_size: got 5; at least the tokenizer's 6"):
        JsonTokenizer(json.dumps(tree)).token_bytes(5)


def test_word_piece_without_its_unknown_token(capfd):
    inner = Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(BadInput, match=r"^tokenizer.json: got"):
        parse_tokenizer(inner.to_str(), "tokenizer.json")
    assert capfd.readouterr().err == ""


def test_an_id_beyond_reason():
    tree = word_level()
    tree["model"]["vocab"]["z"] = 4_000_000_000
    with pytest.raises(BadInput, match=r"an id of 4,000,000,000"):
        parse_tokenizer(json.dumps(tree), "tokenizer.json")
