"""Tokenizers: bytes, or anything a `tokenizer.json` says, behind one small interface.

Both kinds are stored as a genuine `tokenizers` file. Every id stands for known bytes, so that
decoding is joining them and bits per byte are exact for byte-level vocabularies (GPT-2, Llama 3,
ours) and SentencePiece ones with byte fallback (Gemma); what other kinds (WordPiece) lose in
their normalisation is not counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mukv.core.errors import BadInput
from mukv.core.files import require_regular_file, write_atomic

BEGIN = "<|begin|>"
"""Stands before every document; its id in the byte tokenizer is 256."""
TRAINING_BYTES = 1 << 28
"""Of text that a BPE is learnt from; more changes little and takes long."""


def byte_alphabet() -> list[str]:
    """The visible character that byte-level tokenizers write for each byte (GPT-2's table)."""
    shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in shown]
    return [chr(byte if byte in shown else 256 + hidden.index(byte)) for byte in range(256)]


@dataclass(frozen=True)
class JsonTokenizer:
    """What a tokenizer.json says. Safe to share between threads."""

    content: str

    @cached_property
    def inner(self) -> Tokenizer:
        inner = Tokenizer.from_str(self.content)
        inner.no_padding()
        inner.no_truncation()
        # A text that spells <|begin|> must not begin a document.
        inner.encode_special_tokens = True
        return inner

    @cached_property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return 1 + max(self.inner.get_vocab(with_added_tokens=True).values(), default=-1)

    @cached_property
    def start(self) -> tuple[int, ...]:
        """Ids before every document: what the file's own template puts first, at most one."""
        return tuple(self.inner.encode("").ids[:1])

    def encode(self, text: str) -> np.ndarray:
        """Ids of a text, int32 [token], without `start`."""
        (found,) = self.inner.encode_batch_fast([text], add_special_tokens=False)
        return np.array(found.ids, np.int32)

    def encode_marked(self, text: str) -> list[int]:
        """Ids of a text that spells out its special tokens, as a chat template gives it."""
        return self._marked.encode(text, add_special_tokens=False).ids

    @cached_property
    def _marked(self) -> Tokenizer:
        return Tokenizer.from_str(self.content)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens are silent, bytes that are no character become U+FFFD."""
        return b"".join(map(self.token_data, ids)).decode(errors="replace")

    def token_data(self, token: int) -> bytes:
        """Bytes that an id stands for; none for special tokens and for ids of no token."""
        return self._data[token] if 0 <= token < len(self._data) else b""

    @cached_property
    def _data(self) -> list[bytes]:
        inner = self.inner
        spell = _spelling(self)
        added = inner.get_added_tokens_decoder()
        data = [b""] * self.vocab_size
        for text, token in inner.get_vocab(with_added_tokens=True).items():
            if token not in added:
                data[token] = spell(token, text)
            elif not added[token].special:
                data[token] = text.encode()
        return data

    def token_bytes(self, vocab_size: int | None = None) -> np.ndarray:
        """UTF-8 bytes of each id, int32 [vocab]. Raises BadInput for too small a vocabulary."""
        size = self.vocab_size if vocab_size is None else vocab_size
        if size < self.vocab_size:
            raise BadInput("vocab_size", size, f"at least the tokenizer's {self.vocab_size}")
        lengths = np.zeros(size, np.int32)
        lengths[: self.vocab_size] = [len(data) for data in self._data]
        return lengths

    def save(self, path: Path) -> None:
        """Write a tokenizer.json."""
        write_atomic(path, self.content)


class ByteTokenizer(JsonTokenizer):
    """Ids are byte values, and 256 begins a document. The file says the same to others."""

    def __init__(self) -> None:
        vocab = {shown: byte for byte, shown in enumerate(byte_alphabet())}
        byte_level = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        super().__init__(_finished(byte_level, use_regex=False).to_str())

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


class NoTokenizer(JsonTokenizer):
    """Of a model that came without one: there are only ids, which stand for no text."""

    def __init__(self) -> None:
        super().__init__(Tokenizer(models.BPE()).to_str())

    def encode(self, text: str) -> np.ndarray:
        raise BadInput("text", text[:40], "token ids: this model has no tokenizer.json")


AnyTokenizer = ByteTokenizer | JsonTokenizer


def _finished(inner: Tokenizer, use_regex: bool = True) -> Tokenizer:
    """With bytes as alphabet and `BEGIN` before each document."""
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([BEGIN])
    begin = (BEGIN, inner.token_to_id(BEGIN))
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[begin]
    )
    return inner


def _spelling(tokenizer: JsonTokenizer) -> Callable[[int, str], bytes]:
    """How the text of a token becomes bytes, by what the decoder says."""
    decoder = json.dumps(json.loads(tokenizer.content)["decoder"], ensure_ascii=False)
    values = {shown: byte for byte, shown in enumerate(byte_alphabet())}

    def byte_level(token: int, text: str) -> bytes:
        return bytes(values[c] for c in text) if values.keys() >= set(text) else text.encode()

    def sentence_piece(token: int, text: str) -> bytes:
        byte = re.fullmatch("<0x([0-9A-F]{2})>", text)
        return bytes.fromhex(byte[1]) if byte else text.replace("▁", " ").encode()

    def other(token: int, text: str) -> bytes:
        return tokenizer.inner.decode([token]).encode()

    if '"ByteLevel"' in decoder:
        return byte_level
    return sentence_piece if "▁" in decoder else other


def parse_tokenizer(text: str, where: str) -> AnyTokenizer:
    """From the content of a tokenizer.json; `where` names it in messages. Raises BadInput."""
    byte_level = ByteTokenizer()
    if text == byte_level.content:
        return byte_level
    allowed = "a tokenizer.json of Hugging Face's tokenizers"
    try:
        found = JsonTokenizer(text)
        size = found.vocab_size
    except Exception as error:  # tokenizers raises nothing more precise
        raise BadInput(where, f"a file that can't be read ({error})", allowed) from None
    if not size:
        raise BadInput(where, "an empty vocabulary", allowed)
    return found


def load_tokenizer(path: Path) -> AnyTokenizer:
    """From a tokenizer.json, or a folder with one. Raises BadInput."""
    path = path / "tokenizer.json" if path.is_dir() else path
    require_regular_file(path, "tokenizer")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise BadInput("tokenizer", str(path), f"a tokenizer.json ({reason})") from None
    return parse_tokenizer(text, str(path))


def find_tokenizer(path: Path) -> AnyTokenizer:
    """The same; `NoTokenizer` where there is no such file. Raises BadInput for one that is bad."""
    return load_tokenizer(path) if path.exists() else NoTokenizer()


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """A byte-level BPE from at most the first 256 MiB of text.

    It has fewer ids than asked for where the text has nothing left to merge. Raises BadInput for
    a vocabulary smaller than the 257 of the bytes alone.
    """
    if vocab_size < 257:
        raise BadInput("vocab_size", vocab_size, "at least 257: the bytes and the begin of a text")
    inner = _finished(Tokenizer(models.BPE()))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BEGIN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(_first(texts, TRAINING_BYTES), trainer)
    return JsonTokenizer(_finished(inner).to_str())


def _first(texts: Iterable[str], size: int) -> Iterator[str]:
    read = 0
    for text in texts:
        yield text
        read += len(text)
        if read >= size:
            return
