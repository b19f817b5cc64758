"""GGUF files give the logits of the models they were made from; bad files are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("gguf")
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter
from gguf.quants import dequantize, quantize
from tokenizers import Tokenizer

import mukv as package
from mukv.core.errors import BadInput
from mukv.hub import checkpoint, gguf_tokenizer
from mukv.hub.gguf_file import TYPES, GgufFile
from tests.hub.ggufs import QUANTISED, add_value, finish, random_blocks, write_gguf
from tests.pairs import params
from tests.parity.models import LLAMA3, TINY, build, logits, our_logits

IDS = np.arange(2 * 40).reshape(2, 40) * 7 % 97
ROPE8K = LLAMA3 | {"original_max_position_embeddings": 8192}
HEADS = {"head_dim": 16}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "Llama", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", "Llama", {"attention_bias": True}),
    "llama-3.1": ("llama", "Llama", {**HEADS, "rope_parameters": ROPE8K}),
    "mistral": ("llama", "Mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", "Qwen2", {}),
    "qwen3": ("qwen3", "Qwen3", HEADS),
    "gemma2": ("gemma2", "Gemma2", {**HEADS, "sliding_window": 9}),
    "gemma3": ("gemma3", "Gemma3", {**HEADS, "sliding_window": 9, "num_hidden_layers": 7}),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("MUKV_CACHE", str(tmp_path / "cache"))


@pytest.mark.product
@pytest.mark.parametrize("case", params(CASES, [*CASES][2::4]))
def test_logits_are_those_of_the_model(case, tmp_path):
    architecture, family, fields = CASES[case]
    model = build(family, TINY | fields)
    extra: dict[str, Any] = {}
    if case == "gemma2":
        extra = {
            f"gemma2.{cap}_logit_softcapping": v for cap, v in (("attn", 50.0), ("final", 30.0))
        }
    path = tmp_path / "model.gguf"
    if case == "llama-3.1":
        extra["llama.rope.freq_base"] = 10_000.0
        path = with_factors(path, model, extra)
    else:
        write_gguf(path, architecture, model, extra)
    ours = package.load(path)
    expected = logits(model, IDS)
    found = our_logits(ours, IDS)
    assert np.max(np.abs(found - expected)) < 1e-4 * np.max(np.abs(expected))


def with_factors(path: Path, model: Any, extra: dict[str, Any]) -> Path:
    """Write Llama 3.1 as llama.cpp does, with factors of the frequencies in a tensor."""
    inverse = model.model.rotary_emb.inv_freq.numpy()
    plain = 10_000.0 ** -(np.arange(0, 16, 2) / 16)
    add = GGUFWriter.write_header_to_file

    def write(self: GGUFWriter, *given: Any, **options: Any) -> None:
        self.add_tensor("rope_freqs.weight", (plain / inverse).astype(np.float32))
        add(self, *given, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GGUFWriter, "write_header_to_file", write)
        return write_gguf(path, "llama", model, extra)


def tensors_only(path: Path, **tensors: tuple[np.ndarray, str]) -> Path:
    writer = GGUFWriter(path, "llama")
    for name, (array, kind) in tensors.items():
        writer.add_tensor(name, array, raw_dtype=GGMLQuantizationType[kind])
    finish(writer)
    return path


@pytest.mark.parametrize("kind", TYPES)
def test_rows_of_each_type_are_those_of_the_library(kind, tmp_path):
    if kind == "F32":
        raw = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
    elif kind in QUANTISED:
        values = np.random.default_rng(0).normal(size=(6, 64)).astype(np.float32)
        raw = quantize(values, GGMLQuantizationType[kind])
    else:
        raw = random_blocks(kind, 6, 2, 0)
    file = GgufFile(tensors_only(tmp_path / "x.gguf", w=(raw, kind)))
    whole = dequantize(raw, GGMLQuantizationType[kind]) if kind not in ("F32", "F16") else raw
    np.testing.assert_array_equal(file.read("w"), whole)
    np.testing.assert_array_equal(file.read("w", slice(2, 5)), whole[2:5])


@pytest.mark.product
def test_import_eval_generate_export(mukv, tmp_path):
    """Commands take a GGUF file as a model; sixteen-bit weights keep their type."""
    model = build("Llama", TINY | {"vocab_size": 300, "tie_word_embeddings": True})
    path = write_gguf(tmp_path / "tiny.gguf", "llama", model, sentence_piece())
    done = mukv("import", path, "--out", tmp_path / "run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["architecture"] == "LlamaForCausalLM"
    for source in (path, tmp_path / "run"):
        done = mukv("generate", source, "--prompt", "hi", "--max-tokens", 3, "--chat", "--json")
        assert done.returncode == 0, done.stderr
    done = mukv("export", tmp_path / "run", "--out", tmp_path / "exported")
    assert done.returncode == 0, done.stderr
    again = package.load(tmp_path / "exported")
    np.testing.assert_allclose(our_logits(again, IDS), logits(model, IDS), rtol=1e-3, atol=1e-4)


def sentence_piece() -> dict[str, Any]:
    """Return metadata of a small SentencePiece vocabulary with a chat template."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", "h", "i", "hi", "▁hi", "<turn>"]
    tokens += [f"w{n}" for n in range(300 - len(tokens))]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(n) for n in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5, 4, *[1] * (300 - 265)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.chat_template": "{{ bos_token }}<turn>{{ messages[0]['content'] }}",
    }


def made(**changes: Any) -> Tokenizer:
    values = sentence_piece() | changes
    files = gguf_tokenizer.tokenizer_files(values, "llama", "x")
    return Tokenizer.from_str(files["tokenizer.json"])


def test_a_sentence_piece_vocabulary():
    tokens = sentence_piece()["tokenizer.ggml.tokens"]
    inner = made()
    assert [tokens[n] for n in inner.encode("hi hi<turn>é</s>").ids] == [
        *("<s>", "hi", "▁hi", "<turn>", "<0xC3>", "<0xA9>", "</s>"),
    ]
    assert inner.decode(inner.encode("hi  é").ids) == "hi  é"
    prefixed = made(**{"tokenizer.ggml.add_space_prefix": True})
    assert tokens[prefixed.encode("hi").ids[1]] == "▁hi"


def test_the_order_of_merges_is_that_of_scores():
    merges = gguf_tokenizer._merges(["a", "b", "c", "ab", "bc", "abc"], [0, 0, 0, -2, -1, -3])
    assert merges == [("b", "c"), ("a", "b"), ("ab", "c"), ("a", "bc")]


BYTE_LEVEL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.tokens": [*map(chr, range(33, 127)), "Ġ", "Ġa", "12", "<|end|>"],
    "tokenizer.ggml.token_type": [*[1] * 97, 3],
    "tokenizer.ggml.merges": ["Ġ a", "1 2"],
}


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [("gpt-2", ["Ġa", "12", "<|end|>"]), ("smollm", ["Ġa", "1", "2", "<|end|>"])],
)
def test_a_byte_level_vocabulary(pre, pieces):
    values = BYTE_LEVEL | {"tokenizer.ggml.pre": pre}
    files = gguf_tokenizer.tokenizer_files(values, "llama", "x")
    inner = Tokenizer.from_str(files["tokenizer.json"])
    assert inner.encode(" a12<|end|>").tokens == pieces


def header(path: Path, **values: Any) -> Path:
    writer = GGUFWriter(path, values.pop("architecture", "llama"))
    for key, value in values.items():
        add_value(writer, key.replace("__", "."), value)
    finish(writer)
    return path


def test_bad_files_are_refused(tmp_path):
    whole = write_gguf(tmp_path / "model.gguf", "llama", build("Llama", TINY))
    content = whole.read_bytes()

    def refused(path: Path, *words: str) -> None:
        with pytest.raises(BadInput) as error:
            package.load(path)
        assert all(word in str(error.value) for word in words), str(error.value)

    refused(header(tmp_path / "a.gguf", architecture="llamma"), "general.architecture", "'llama'")
    refused(header(tmp_path / "b.gguf"), "llama: attention.head_count", "required")
    (tmp_path / "c.gguf").write_bytes(b"GGML" + content[4:])
    refused(tmp_path / "c.gguf", "not GGUF")
    (tmp_path / "d.gguf").write_bytes(content[: len(content) // 2])
    refused(tmp_path / "d.gguf", "ends before byte")
    writer = GGUFWriter(tmp_path / "e.gguf", "llama", endianess=GGUFEndian.BIG)
    finish(writer)
    refused(tmp_path / "e.gguf", "byte order")
    (tmp_path / "g-00002-of-00003.gguf").write_bytes(content)
    refused(tmp_path / "g-00002-of-00003.gguf", "g-00001-of-00003.gguf", "missing")
    refused(tensors_only(tmp_path / "h.gguf", blk=(np.zeros((2, 32), np.float32), "F32")), "tensor")
    (tmp_path / "i.gguf").mkdir()
    with pytest.raises(BadInput):
        package.load(tmp_path / "i.gguf")


def test_a_type_that_is_not_read_is_named(tmp_path):
    raw = random_blocks("IQ4_NL", 4, 1, 0)
    path = tensors_only(tmp_path / "x.gguf", w=(raw, "IQ4_NL"))
    with pytest.raises(BadInput, match=r"w: type.*IQ4_NL.*Q4_K"):
        GgufFile(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.head_count", 0),
        ("llama.attention.head_count", [2, 2]),
        ("llama.embedding_length", "wide"),
        ("llama.rope.freq_base", "fast"),
    ],
)
def test_numbers_of_the_metadata_are_checked(key, value, tmp_path):
    model = build("Llama", TINY)
    path = write_gguf(tmp_path / "x.gguf", "llama", model, {key: value}, replaced=True)
    with pytest.raises(BadInput) as error:
        package.load(path)
    assert key.split(".", 1)[1] in str(error.value)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tokenizer.ggml.token_type", 3, "a list"),
        ("tokenizer.ggml.tokens", [1, 2], "a list of texts"),
        ("tokenizer.ggml.model", "wordpeace", "tokenizer.ggml.model"),
        ("tokenizer.ggml.scores", [0.0], "scores"),
        ("tokenizer.ggml.token_type", [1], "one for each token"),
        ("tokenizer.ggml.tokens", ["a", "a"], "each token once"),
        ("tokenizer.ggml.bos_token_id", 1_000_000, "bos_token_id"),
    ],
)
def test_bad_tokenizers_are_refused(key, value, said):
    with pytest.raises(BadInput) as error:
        made(**{key: value})
    assert said in str(error.value)


def test_an_unknown_way_to_split_is_refused():
    with pytest.raises(BadInput, match="smollm"):
        gguf_tokenizer.tokenizer_files(BYTE_LEVEL | {"tokenizer.ggml.pre": "smolm"}, "llama", "x")


@pytest.mark.product
def test_split_files_are_joined(tmp_path):
    model = build("Llama", TINY)
    whole = write_gguf(tmp_path / "whole.gguf", "llama", model)
    file = GgufFile(whole)
    names = sorted(file.tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        writer = GGUFWriter(tmp_path / f"m-{number:05}-of-00002.gguf", "llama")
        for key, value in file.values.items() if number == 1 else ():
            if key != "general.architecture":
                add_value(writer, key, value)
        for name in part:
            writer.add_tensor(name, np.array(file.read(name)))
        finish(writer)
    one, two = package.load(whole), package.load(tmp_path / "m-00001-of-00002.gguf")
    np.testing.assert_array_equal(our_logits(one, IDS), our_logits(two, IDS))


TRICKY = (
    *("", "  two  spaces", "def f(x):\n    return x\n\t# tab", "émoji 🙂🚀 and ñ", "12345 6 7"),
    *("<|im_start|>user\nhi<|im_end|>", "<bos>text<eos>", "don't we'll", "日本語", "\r\n\r\n  x"),
)


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_real_files_are_what_transformers_reads(name):
    """GGUF files in the folder MUKV_MODELS equal the folders that transformers made of them."""
    models = Path(os.environ.get("MUKV_MODELS", "/nowhere"))
    if not (models / f"{name}.gguf").exists():
        pytest.skip("needs MUKV_MODELS")
    ours, theirs = (checkpoint.find(models / each) for each in (f"{name}.gguf", name))
    assert ours is not None
    assert theirs is not None
    assert ours.model == theirs.model
    by_name = {(piece.ours, piece.place): piece for piece in theirs.pieces}
    for piece in ours.pieces:
        other = by_name[piece.ours, piece.place].read(theirs.source)
        np.testing.assert_array_equal(piece.read(ours.source), other)
    for text in TRICKY:
        np.testing.assert_array_equal(ours.tokenizer.encode(text), theirs.tokenizer.encode(text))
        assert ours.tokenizer.encode_marked(text) == theirs.tokenizer.encode_marked(text)
