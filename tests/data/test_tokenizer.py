"""Tokenizers: ids stand for bytes, and files round-trip."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

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
