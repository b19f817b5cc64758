"""Tokenizers: ids stand for bytes, and files round-trip."""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from mukv.core.errors import BadInput
from mukv.data.growth import growth
from mukv.data.panics import is_quick, may_panic, telling_tokenizer_errors
from mukv.data.tokenizer import (
    ByteTokenizer,
    JsonTokenizer,
    load_tokenizer,
    parse_tokenizer,
    train_bpe,
)

BYTES = ByteTokenizer()
BPE = train_bpe(["the cat and the dog and the hat"] * 20, 300)


@pytest.mark.product
@pytest.mark.parametrize("tokenizer", [BYTES, BPE])
@given(text=st.text() | st.just("a<|begin|>b"))
def test_decoding_undoes_encoding(tokenizer: JsonTokenizer, text: str):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids.tolist()) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())
    assert tokenizer.start[0] not in ids


@pytest.mark.product
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


def test_words_without_a_decoder_are_joined_by_spaces():
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "one": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = JsonTokenizer(inner.to_str())
    assert tokenizer.encode("one two one").tolist() == [1, 0, 1]
    assert tokenizer.token_data(1) == b" one"
    assert tokenizer.decode([1, 0, 1]) == inner.decode([1, 0, 1]) == "one [UNK] one"
    assert tokenizer.decode_further([1, 0, 1]) == " one [UNK] one"


def of_kinds() -> dict[str, tuple[Tokenizer, int]]:
    """Return a tokenizer of each kind of decoder, and the number of bytes that its decoder drops at
    the ends of a text."""
    raw = [f"<0x{byte:02X}>" for byte in range(256)]

    def bpe(words, merges=(), **more):
        vocab = {word: i for i, word in enumerate(["<unk>", *words])}
        return Tokenizer(models.BPE(vocab, list(merges), unk_token="<unk>", **more))

    made = {}
    made["bytes"] = (Tokenizer.from_str(BYTES.content), 0)
    made["bpe"] = (Tokenizer.from_str(BPE.content), 0)
    inner = bpe([*raw, "a", "b", "ab", " "], [("a", "b")], byte_fallback=True)
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    made["byte fallback"] = (inner, 0)
    inner = bpe([*raw, "\u2581", "a", "\u2581a"], [("\u2581", "a")], byte_fallback=True)
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made["llama 2"] = (inner, 1)
    inner = bpe(["a", "b", "\u2581", "\u2581a"], [("\u2581", "a")])
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made["metaspace"] = (inner, 1)
    pieces = [("<unk>", 0.0), ("a", -1.0), ("\u2581a", -2.0), ("b", -3.0), ("\u2581", -4.0)]
    inner = Tokenizer(models.Unigram(pieces, 0))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    made["unigram"] = (inner, 1)
    words = ["[UNK]", "a", "##a", "##b", "b", ".", ",", "'", "##s", "s", "do", "not"]
    inner = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    made["word piece"] = (inner, 1)
    inner = bpe(["a", "b", "a</w>", "b</w>", "ab</w>"], [("a", "b</w>")], end_of_word_suffix="</w>")
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.decoder = decoders.BPEDecoder("</w>")
    made["suffix"] = (inner, 1)
    inner = bpe(["a", "b"])
    inner.add_tokens(["\u65e5\u672c", "ab"])
    made["no decoder"] = (inner, 1)
    inner = Tokenizer.from_str(BPE.content)
    inner.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    made["bytes without the first space"] = (inner, 1)
    return made


@pytest.mark.parametrize("kind", of_kinds())
@given(text=st.text("ab \u00e9\u65e5\u672c.,'s", max_size=12))
def test_texts_and_bytes_are_those_of_the_library(kind: str, text: str):
    inner, ends = of_kinds()[kind]
    tokenizer = JsonTokenizer(inner.to_str())
    ids = tokenizer.encode(text).tolist()
    decoded = tokenizer.decode(ids)
    assert decoded == inner.decode(ids)
    # Between other tokens nothing is dropped.
    around = tokenizer.encode("a").tolist()
    inside = len(inner.decode([*around, *ids, *around]).encode())
    lengths = tokenizer.token_bytes()
    assert 0 <= lengths[[*around, *ids, *around]].sum() - inside <= ends
    assert 0 <= lengths[ids].sum() - len(decoded.encode()) <= ends
    assert decoded in tokenizer.decode_further(ids)


@pytest.mark.parametrize(
    "tokenizer", [BYTES, BPE, JsonTokenizer(of_kinds()["llama 2"][0].to_str())]
)
def test_lone_surrogates_are_no_text(tokenizer: JsonTokenizer):
    for encode in (tokenizer.encode, tokenizer.encode_marked):
        with pytest.raises(BadInput, match="lone surrogates"):
            encode("a\ud800b")


def panicking(part: str, expression: str) -> str:
    """Return a tokenizer whose expression takes too many steps on "x" * 40."""
    words = {"[UNK]": 0, **{f"w{i}": i for i in range(1, 500)}, "a": 500, "x" * 40: 501}
    inner = Tokenizer(models.WordLevel(words, "[UNK]"))
    pattern = Regex(expression)
    if part == "normalizer":
        inner.normalizer = normalizers.Replace(pattern, "z")
    elif part == "pre_tokenizer":
        inner.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    else:
        inner.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace(pattern, "z")])
    return inner.to_str()


@pytest.mark.parametrize(
    "part",
    [
        normalizers.Replace("", "b"),
        normalizers.Replace(Regex("$"), "b"),
        normalizers.Replace(Regex("c*"), "b"),
        normalizers.Sequence([normalizers.Replace(Regex("(?=b)"), "a"), normalizers.Lowercase()]),
        pre_tokenizers.Split(Regex("(a+b?)+$"), "isolated"),
    ],
)
def test_parts_that_may_panic_are_silent(part, capfd):
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    if isinstance(part, normalizers.Normalizer):
        inner.normalizer = part
    else:
        inner.pre_tokenizer = part
    tokenizer = JsonTokenizer(inner.to_str())
    for text in ("", "a", "ab", "a" * 40, "\u00e9", "a" * 40 + "c"):
        with suppress(BadInput):
            tokenizer.encode(text)
    assert capfd.readouterr().err == ""


@pytest.mark.product
@pytest.mark.parametrize("expression", ["(x+x+)+y", "(x|xx)+y", "(x+x+x+)+y"])
@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder"])
def test_a_panic_is_one_clear_line(part: str, expression: str, capfd):
    tokenizer = parse_tokenizer(panicking(part, expression), "tokenizer.json")
    calls = [lambda: tokenizer.encode("x" * 40), lambda: tokenizer.encode_marked("x" * 40)]
    if part == "decoder":
        calls = [lambda: tokenizer.decode([501]), tokenizer.token_bytes]
    for call in calls:
        with pytest.raises(BadInput, match="retry-limit") as told:
            call()
        assert "\n" not in str(told.value)
    assert capfd.readouterr().err == ""
    assert tokenizer.encode("a").tolist() == [500]  # the tokenizer still works


def test_other_output_is_kept_while_a_trace_is_suppressed(capfd):
    tokenizer = JsonTokenizer(panicking("normalizer", "(x+x+)+y"))
    with telling_tokenizer_errors("here", "a text", quiet=True):
        os.write(2, b"one\n")
        with pytest.raises(BadInput):
            tokenizer.encode("x" * 40)
        os.write(2, b"two\n")
    assert capfd.readouterr().err == "one\ntwo\n"


@pytest.mark.parametrize(
    ("expression", "quick"),
    [
        (r"'s|'t| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+", True),
        (r"(?i:'s|'t)|[^\r\n\p{L}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}]+[\r\n]*|\s*[\r\n]+", True),
        (r"[\p{Lu}\p{M}]*[\p{Ll}\p{M}]+(?i:'s|'t)?|[!()*+]\S", True),
        ("(x+x+)+y", False),
        ("(a|aa)+$", False),
        ("x+x+y", False),
        (r"(a)\1+b", False),
        ("(?:a+|b)c+d", False),
    ],
)
def test_expressions_of_bounded_time_are_recognised(expression: str, quick: bool):
    assert is_quick(expression) == quick


@given(st.text() | st.sampled_from(["{}", "[]", "null", BYTES.content[:900]]))
def test_foreign_files_are_refused(content: str):
    with pytest.raises(BadInput, match="here"):
        parse_tokenizer(content, "here")


@pytest.mark.parametrize("content", ["[]", "{}", "3", '{"model": null}', '{"model": []}'])
def test_files_without_a_model_say_so(content: str):
    with pytest.raises(BadInput, match=r"^here: got .*\(no JSON object with a `model`\)"):
        parse_tokenizer(content, "here")


def test_missing_files_are_refused(tmp_path: Path):
    with pytest.raises(BadInput, match="No such file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(np.arange(256, dtype=np.uint8).tobytes())
    with pytest.raises(BadInput, match="UTF-8"):
        load_tokenizer(tmp_path)


def word_level(**changes):
    """Return the tree of a small tokenizer.json with a template around a text."""
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
        (
            {
                "type": "Sequence",
                "processors": [
                    {
                        "type": "ByteLevel",
                        "add_prefix_space": True,
                        "trim_offsets": True,
                        "use_regex": True,
                    },
                    template("<s> $A"),
                ],
            },
            (3,),
        ),
        (template("<s> $A </s> $A"), (3,)),
    ],
)
def test_encoded_texts_begin_with_the_start_tokens(processor, start):
    tokenizer = JsonTokenizer(json.dumps(word_level(post_processor=processor)))
    assert tokenizer.start == start
    theirs = Tokenizer.from_str(tokenizer.content).encode("a b").ids
    assert [*start, *tokenizer.encode("a b").tolist()] == theirs[: len(start) + 2]


def test_start_of_a_vocabulary_without_usual_letters():
    """The start token is found although the vocabulary has none of the usual letters and drops
    unknown ones."""
    inner = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "\u65e5": 2}, []))
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer = parse_tokenizer(inner.to_str(), "tokenizer.json")
    assert tokenizer.start == (0,)
    assert inner.encode("\u65e5").ids == [*tokenizer.start, *tokenizer.encode("\u65e5")] == [0, 2]


@pytest.mark.parametrize(
    ("processor", "words"),
    [
        ({**BERT, "cls": ["<s>", 99]}, "a template with id 99'; ids below 5"),
        ({**template("<s> $A"), "special_tokens": {}}, "'<s>'"),
        (
            {"type": "Sequence", "processors": [template("<s> $A"), BERT]},
            "two parts of its post_processor",
        ),
        (
            {**template("$A"), "single": [{"Sequence": {"id": "B", "type_id": 0}}]},
            "names a second text",
        ),
    ],
)
def test_impossible_templates_are_refused(processor, words, capfd):
    content = json.dumps(word_level(post_processor=processor))
    with pytest.raises(BadInput, match=r"^tokenizer\.json: ") as told:
        parse_tokenizer(content, "tokenizer.json")
    assert words in str(told.value)
    assert "\n" not in str(told.value) + capfd.readouterr().err


def test_encoding_is_not_random():
    merges, vocab = [("a", "b"), ("ab", "ab")], {"a": 0, "b": 1, "ab": 2, "abab": 3}
    tokenizer = JsonTokenizer(Tokenizer(models.BPE(vocab, merges, dropout=0.9)).to_str())
    assert "0.9" in tokenizer.content
    for _ in range(50):
        assert tokenizer.encode("abab").tolist() == tokenizer.encode_marked("abab") == [3]


def test_an_id_has_one_token():
    tree = word_level()
    tree["model"]["vocab"]["c"] = 2
    for_word, tree = json.dumps(tree), word_level()
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 2, "content": "<image>"})
    for_added, tree = json.dumps(tree), word_level()
    tree["added_tokens"] += [
        {**tree["added_tokens"][0], "id": 5, "content": text} for text in ("<image>", "<audio>")
    ]
    for content, token in ((for_word, 2), (for_added, 2), (json.dumps(tree), 5)):
        with pytest.raises(BadInput, match=f"both with id {token}.*; an id of its own"):
            parse_tokenizer(content, "tokenizer.json")
    parse_tokenizer(json.dumps(word_level()), "tokenizer.json")


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
    """The text of an added token of spaces, as Gemma has them, is the decoder's."""
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


def test_a_special_token_that_no_text_has_needs_no_embedding():
    tree = word_level()
    # The library numbers an added token after the vocabulary's last.
    tree["added_tokens"].append({**tree["added_tokens"][0], "id": 5, "content": "<image>"})
    tokenizer = JsonTokenizer(json.dumps(tree))
    assert (tokenizer.vocab_size, tokenizer.text_vocab_size) == (6, 3)
    assert tokenizer.token_bytes(5).tolist() == [6, 2, 2, 0, 0]
    tree["post_processor"] = template("<s> $A </s>")
    assert JsonTokenizer(json.dumps(tree)).text_vocab_size == 4
    # A token that is not special needs one.
    tree["added_tokens"][-1]["special"] = False
    with pytest.raises(BadInput, match="vocab_size: got 5; at least the tokenizer's 6"):
        JsonTokenizer(json.dumps(tree)).token_bytes(5)


def test_word_piece_without_its_unknown_token(capfd):
    inner = Tokenizer(models.WordPiece({"a": 0}, unk_token="[UNK]"))
    with pytest.raises(BadInput, match=r"^tokenizer.json: got"):
        parse_tokenizer(inner.to_str(), "tokenizer.json")
    assert capfd.readouterr().err == ""


def spelling_special_tokens() -> dict[str, Tokenizer]:
    """Return tokenizers whose models merge the letters of "<s>" into it."""
    words = ["[UNK]", "<", "s", ">", "<s>", "a", "s>"]
    vocab = {word: i for i, word in enumerate(words)}
    made = {
        "word level": Tokenizer(models.WordLevel(vocab, "[UNK]")),
        "word piece": Tokenizer(models.WordPiece(vocab, unk_token="[UNK]")),
        "bpe": Tokenizer(models.BPE(vocab, [("s", ">"), ("<", "s>")], unk_token="[UNK]")),
        "whole words": Tokenizer(
            models.BPE(vocab, [("s", ">")], unk_token="[UNK]", ignore_merges=True)
        ),
        "unigram": Tokenizer(models.Unigram([(w, -len(w) % 3 - 9.0) for w in words], 0)),
    }
    for inner in made.values():
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        inner.add_special_tokens(["<s>", "[UNK]"])
    return made


@pytest.mark.parametrize(
    ("kind", "plain"),
    [
        ("word level", [0]),
        ("word piece", [0]),
        ("bpe", [1, 6]),
        ("whole words", [1, 6]),
        ("unigram", [1, 6]),
    ],
)
def test_texts_contain_no_special_tokens(kind, plain):
    inner = spelling_special_tokens()[kind]
    tokenizer = parse_tokenizer(inner.to_str(), "tokenizer.json")
    assert inner.encode("a <s> a").ids == tokenizer.encode_marked("a <s> a") == [5, 4, 5]
    assert tokenizer.encode("a <s> a").tolist() == [5, *plain, 5]
    assert tokenizer.encode("a [UNK]").tolist()[0] == 5
    assert tokenizer.decode([4, 5]) == "a"
    assert tokenizer.inner.token_to_id("<s>") == 4


def normalizing(*parts: normalizers.Normalizer, decoder: bool = False) -> str:
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    if parts:
        inner.normalizer = normalizers.Sequence(list(parts))
    if decoder:
        inner.decoder = decoders.Sequence([decoders.Replace("a", "a" * 2000)] * 4)
    return inner.to_str()


LONG = "a" * 2000


@pytest.mark.parametrize(
    "content",
    [
        normalizing(*[normalizers.Replace("a", LONG)] * 4),
        normalizing(*[normalizers.Replace("z", "z" * 2000)] * 4),
        normalizing(*[normalizers.Replace(Regex("[a-z]"), LONG)] * 4),
        normalizing(*[normalizers.Replace(Regex("(?=a)"), LONG)] * 4),
        normalizing(*[normalizers.Replace("a", "bb"), normalizers.Replace("b", "aa")] * 20),
        normalizing(*[normalizers.Prepend(LONG), normalizers.Replace("a", LONG)] * 2),
        normalizing(*[normalizers.ByteLevel()] * 40),
        normalizing(decoder=True),
    ],
)
def test_parts_that_make_texts_much_longer_are_refused(content):
    with pytest.raises(BadInput, match=r"^here: got 'a (normalizer|decoder) that makes a text"):
        parse_tokenizer(content, "here")


PARTS = st.sampled_from(
    [
        normalizers.Replace("a", "bb"),
        normalizers.Replace("bb", "abc"),
        normalizers.Replace("c", ""),
        normalizers.Replace(Regex("[ab]"), "cab"),
        normalizers.Replace(Regex("a+|bc"), "ba"),
        normalizers.Prepend("ab"),
        normalizers.ByteLevel(),
        normalizers.Lowercase(),
    ]
)


@given(st.lists(PARTS, max_size=6), st.text("abcB\u00e9 ", min_size=1, max_size=8))
def test_the_bound_on_growth_holds(parts, text):
    states = [json.loads(part.__getstate__()) for part in parts]
    assert len(normalizers.Sequence(parts).normalize_str(text)) <= growth(states) * len(text)
    assert not may_panic({"normalizer": {"type": "Sequence", "normalizers": states}})


def test_published_normalizers_stay_far_below_the_bound():
    parts = [
        normalizers.Prepend("\u2581"),
        normalizers.Replace(" ", "\u2581"),
        normalizers.Replace(Regex(" {2,}"), " "),
        normalizers.NFKC(),
        normalizers.Replace("\u2026", "..."),
        normalizers.Replace("%", " percent "),
        normalizers.Replace("&", " and "),
    ]
    assert growth([json.loads(part.__getstate__()) for part in parts]) < 20
    parse_tokenizer(normalizing(*parts), "here")


def test_models_without_sensible_limits():
    for name, value in (("max_input_chars_per_word", 10**9), ("continuing_subword_prefix", LONG)):
        inner = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
        tree = json.loads(inner.to_str())
        tree["model"][name] = value
        with pytest.raises(BadInput, match=f"^here: got '{name} of"):
            parse_tokenizer(json.dumps(tree), "here")


def test_a_file_has_at_most_200_mb(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(200_000_001)
    with pytest.raises(BadInput, match=r"at most 200,000,000 bytes, not 200,000,001"):
        load_tokenizer(tmp_path)


def test_too_large_ids_are_refused():
    tree = word_level()
    tree["model"]["vocab"]["z"] = 4_000_000_000
    with pytest.raises(BadInput, match=r"an id of 4,000,000,000"):
        parse_tokenizer(json.dumps(tree), "tokenizer.json")
