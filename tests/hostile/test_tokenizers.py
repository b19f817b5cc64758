"""Damaged and foreign tokenizer.json files are refused in one line, or work in full."""

from __future__ import annotations

import copy
import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mukv.data.tokenizer import ByteTokenizer, parse_tokenizer, train_bpe
from tests.hostile.harness import check_all

TEXTS = ("", "a text", "d\u00e9j\u00e0 vu\n\t 1+1", "\U0001f600<s></s>", "\0\ufffd", " " * 9)


def originals() -> dict[str, dict[str, Any]]:
    """Return a valid file of each kind of model."""
    words = {word: i for i, word in enumerate(["[UNK]", "a", "text", "##s", "<s>", "</s>", "1"])}
    made = {
        "word piece": Tokenizer(models.WordPiece(words, unk_token="[UNK]")),
        "word level": Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        "unigram": Tokenizer(
            models.Unigram([("<unk>", 0.0), ("a", -1.0), ("\u2581text", -2.0), ("t", -3.0)], 0)
        ),
    }
    for name, inner in made.items():
        if name == "unigram":
            inner.pre_tokenizer = pre_tokenizers.Metaspace()
            inner.decoder = decoders.Metaspace()
        else:
            inner.normalizer = normalizers.Sequence([normalizers.NFD(), normalizers.Lowercase()])
            inner.pre_tokenizer = pre_tokenizers.Whitespace()
            inner.add_special_tokens(["<s>", "</s>"])
            inner.post_processor = processors.TemplateProcessing(
                single="<s> $A </s>", special_tokens=[("<s>", 4), ("</s>", 5)]
            )
    files = {name: inner.to_str() for name, inner in made.items()}
    files["bytes"] = ByteTokenizer().content
    files["bpe"] = train_bpe(["the cat and the hat"] * 9, 270).content
    return {name: json.loads(text) for name, text in files.items()}


JUNK = (
    *(None, True, -1, 0, 1 << 31, 1 << 40, 1.5, 1e308, "", "x", "\u2581", [], {}, [[]], [None]),
    *({"type": "Sequence"}, {"type": "NoSuch"}, {"type": "ByteLevel"}, {"type": "BPE"}, [1, "a"]),
)


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return paths to all values, of long lists and mappings the first 14."""
    found = [path] if path else []
    if isinstance(node, dict):
        items = list(node.items())
    elif isinstance(node, list):
        items = list(enumerate(node))
    else:
        items = []
    for key, child in items[:14]:
        found += places(child, (*path, key))
    return found


def mutated(original: dict[str, Any], rng: random.Random) -> str:
    tree = copy.deepcopy(original)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        path = rng.choice(places(tree) or [("version",)])
        node = tree
        for key in path[:-1]:
            node = node[key]
        if rng.random() < 0.25 and isinstance(node, dict):
            node.pop(path[-1], None)
        else:
            node[path[-1]] = copy.deepcopy(rng.choice(JUNK))
    text = json.dumps(tree)
    if rng.random() < 0.1:
        cut = rng.randrange(len(text))
        text = text[:cut] + rng.choice(("", "\0", "}", '"', "NaN")) + text[cut + rng.randrange(3) :]
    return text


def use(text: str) -> None:
    """Parse a file and call all methods of its tokenizer."""
    tokenizer = parse_tokenizer(text, "tokenizer.json")
    assert all(token >= 0 for token in tokenizer.start)
    lengths = tokenizer.token_bytes()
    for words in TEXTS:
        ids = tokenizer.encode(words)
        assert lengths[ids].sum() == sum(len(tokenizer.token_data(token)) for token in ids)
        assert isinstance(tokenizer.decode(ids.tolist()), str)
        tokenizer.encode_marked(words)


def test_tokenizers(record_property):
    rng = random.Random(0)
    calls = [
        (f"{name}: {text[-200:]}", lambda text=text: use(text))
        for name, original in originals().items()
        for text in (mutated(original, rng) for _ in range(100))
    ]
    counts = check_all("tokenizers", calls, record_property)
    assert min(counts.values()) > 20


NORMALIZERS = (
    *({"type": "Replace", "pattern": {"String": "a"}, "content": "a" * n} for n in (0, 3, 2000)),
    *({"type": "Replace", "pattern": {"String": "x"}, "content": "x" * n} for n in (2, 20, 2000)),
    *(
        {"type": "Replace", "pattern": {"Regex": text}, "content": "ax"}
        for text in ("(x+x+)+y", "$", "a*", "(?=x)", r"\s+", "[", "(a|aa)+$")
    ),
    {"type": "Prepend", "prepend": "\u2581a"},
    {"type": "Prepend", "prepend": "a" * 3000},
    {"type": "Replace", "pattern": {"String": ""}, "content": "a"},
    *({"type": name} for name in ("NFKD", "Lowercase", "ByteLevel", "Nmt", "StripAccents")),
)
PRE_TOKENIZERS = (
    *(
        {"type": "Split", "pattern": {"Regex": text}, "behavior": "Isolated", "invert": False}
        for text in ("(x+x+)+y", "$", "a*", "(?=x)", r"\s+", "(a|aa)+$")
    ),
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": False},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
    {"type": "Digits", "individual_digits": True},
    {"type": "FixedLength", "length": 0},
    {"type": "WhitespaceSplit"},
)
DECODERS = (
    *NORMALIZERS[:13],
    {"type": "Strip", "content": "a", "start": 1, "stop": 3},
    {"type": "Strip", "content": " ", "start": 1 << 40, "stop": 0},
    {"type": "CTC", "pad_token": "a", "word_delimiter_token": "|", "cleanup": True},
    {"type": "WordPiece", "prefix": "##", "cleanup": True},
    {"type": "BPEDecoder", "suffix": "a"},
    *({"type": name} for name in ("Fuse", "ByteFallback")),
    {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True},
)


def assembled(original: dict[str, Any], rng: random.Random) -> str:
    """Return a file of parts each of which is valid by itself."""
    tree = copy.deepcopy(original)
    places = (
        ("normalizer", "normalizers", NORMALIZERS),
        ("pre_tokenizer", "pretokenizers", PRE_TOKENIZERS),
        ("decoder", "decoders", DECODERS),
    )
    for place, name, parts in places:
        if rng.random() < 0.6:
            chosen = [rng.choice(parts) for _ in range(rng.choice((1, 1, 2, 4, 30)))]
            tree[place] = {"type": "Sequence", name: chosen}
    if tree["model"]["type"] == "BPE":
        tree["model"]["dropout"] = rng.choice((None, 0.5, 1.0))
    return json.dumps(tree)


@pytest.mark.product
def test_parts_that_are_harmful_together(record_property, capfd):
    rng = random.Random(1)
    files = originals()

    def use_long(text: str) -> None:
        use(text)
        tokenizer = parse_tokenizer(text, "tokenizer.json")
        for words in ("x" * 40, "a" * 300, "xa " * 50):
            ids = tokenizer.encode(words)
            assert ids.tolist() == tokenizer.encode(words).tolist()
            tokenizer.decode(ids.tolist())

    calls = [
        (f"{name}: {text[:300]}", lambda text=text: use_long(text))
        for name, original in files.items()
        for text in (assembled(original, rng) for _ in range(60))
    ]
    counts = check_all("assembled tokenizers", calls, record_property)
    assert min(counts.values()) > 40
    assert "panicked" not in capfd.readouterr().err
