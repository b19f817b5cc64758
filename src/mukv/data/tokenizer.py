"""Tokenizers: bytes, or any `tokenizer.json`, behind one small interface.

Both kinds are stored as a `tokenizers` file. Every id has known bytes, so that bits per byte are
exact for byte-level vocabularies (GPT-2, Llama 3, mukv's own) and SentencePiece vocabularies with
byte fallback (Gemma). Bytes that other tokenizers (WordPiece) remove from a text by normalisation
are not counted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from mukv.core.arguments import require_text
from mukv.core.errors import BadInput
from mukv.data.growth import require_bounded
from mukv.data.panics import may_panic, telling_tokenizer_errors
from mukv.data.spelling import byte_alphabet, spelled
from mukv.storage.files import require_regular_file, write_atomic

BEGIN = "<|begin|>"
"""Token before every document; its id in the byte tokenizer is 256."""
MOST_BYTES = 200_000_000
"""Largest size of a tokenizer.json, in bytes; Gemma 3's has 33 MB."""
MOST_IDS = 1 << 24
"""Upper bound of ids: the largest published vocabularies have 2**18."""
TRAINING_BYTES = 1 << 28
"""Maximum bytes of text that BPE is trained on; more text changes little and takes long."""


@dataclass(frozen=True)
class JsonTokenizer:
    """The tokenizer of a tokenizer.json's text. It can be shared between threads."""

    content: str

    @cached_property
    def inner(self) -> Tokenizer:
        inner = _plain(self.content)
        # The text <|begin|> inside a document must not begin a document.
        inner.encode_special_tokens = True
        special = [t.content for t in inner.get_added_tokens_decoder().values() if t.special]
        if _spells_one(inner, special):
            inner.model = _without_words(json.loads(self.content)["model"], set(special))
        return inner

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return 1 + max(self._vocab.values(), default=-1)

    @cached_property
    def text_vocab_size(self) -> int:
        """One more than the largest id of a tokenised text, which is the vocabulary that a model
        needs.

        Special tokens count only if they begin a text, because published files name special tokens
        for which their models have no embedding.
        """
        special = {t for t, token in self._added.items() if token.special}
        # A special token may be the unknown token.
        unknown = getattr(self.inner.model, "unk_token", None) or ""
        special -= {*self.start, self._vocab.get(unknown)}
        ids = self._vocab.values()
        return 1 + max((token for token in ids if token not in special), default=-1)

    @cached_property
    def start(self) -> tuple[int, ...]:
        """Ids before every document, from the file's template. Ids that the template puts after a
        text are ignored."""
        return _start(self.settings.get("post_processor"))

    @cached_property
    def fingerprint(self) -> str:
        """The SHA-256 of all tokens with their ids; equal for tokenizers with the same ids."""
        ordered = sorted(self._vocab.items(), key=lambda item: (item[1], item[0]))
        return hashlib.sha256(json.dumps(ordered).encode()).hexdigest()

    @cached_property
    def _vocab(self) -> dict[str, int]:
        return self.inner.get_vocab(with_added_tokens=True)

    @cached_property
    def _added(self) -> dict[int, Any]:
        return self.inner.get_added_tokens_decoder()

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The content of the file without its vocabulary and merges."""
        tree = json.loads(self.content)
        if not isinstance(tree, dict) or not isinstance(tree.get("model"), dict):
            raise ValueError("no JSON object with a `model`")
        for name in ("vocab", "merges"):
            tree["model"].pop(name, None)
        return tree

    @cached_property
    def _may_panic(self) -> bool:
        return may_panic(self.settings)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of a text, int32 [token], without `start`. Raises BadInput for lone
        surrogates."""
        require_text("text", text)
        with telling_tokenizer_errors("text", text[:40], self._may_panic):
            (found,) = self.inner.encode_batch_fast([text], add_special_tokens=False)
        return np.array(found.ids, np.int32)

    def encode_marked(self, text: str) -> list[int]:
        """Return the ids of a text in which special tokens are written out, as a chat template
        writes them."""
        require_text("text", text)
        with telling_tokenizer_errors("text", text[:40], self._may_panic):
            return self._marked.encode(text, add_special_tokens=False).ids

    @cached_property
    def _marked(self) -> Tokenizer:
        return _plain(self.content)

    def decode(self, ids: Iterable[int]) -> str:
        """Decode ids from the start of a text, by the file's decoder.

        Special tokens and unused ids are left out; bytes that are not characters become U+FFFD.
        """
        known = [int(token) for token in ids if 0 <= token < self.vocab_size]
        with telling_tokenizer_errors("token ids", str(known[:20]), self._may_panic):
            return self.inner.decode(known)

    def decode_further(self, ids: Iterable[int]) -> str:
        """Decode ids that follow other ids, keeping the space before the first word."""
        return b"".join(map(self.token_data, ids)).decode(errors="replace")

    def token_data(self, token: int) -> bytes:
        """Return the bytes that an id appends to a text; empty for special tokens and
        unused ids."""
        return self._data[token] if 0 <= token < len(self._data) else b""

    @cached_property
    def _data(self) -> list[bytes]:
        silent = {token for token, added in self._added.items() if added.special}
        with telling_tokenizer_errors("tokenizer.json", "its decoder", self._may_panic):
            return spelled(self.inner, self.settings.get("decoder"), silent, self.vocab_size)

    def token_bytes(self, vocab_size: int | None = None) -> np.ndarray:
        """Return the number of UTF-8 bytes of each id, int32 [vocab]. Raises BadInput for a
        vocabulary that is too small."""
        size = self.vocab_size if vocab_size is None else vocab_size
        if size < self.text_vocab_size:
            raise BadInput("vocab_size", size, f"at least the tokenizer's {self.text_vocab_size}")
        lengths = np.zeros(size, np.int32)
        known = self._data[:size]
        lengths[: len(known)] = [len(data) for data in known]
        return lengths

    def save(self, path: Path) -> None:
        """Write a tokenizer.json."""
        write_atomic(path, self.content)


class ByteTokenizer(JsonTokenizer):
    """Tokenizer whose ids are the values of bytes; id 256 begins a document."""

    def __init__(self) -> None:
        vocab = {shown: byte for byte, shown in enumerate(byte_alphabet())}
        byte_level = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        super().__init__(_finished(byte_level, use_regex=False).to_str())

    def encode(self, text: str) -> np.ndarray:
        require_text("text", text)
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_further(ids)


class NoTokenizer(JsonTokenizer):
    """Placeholder for a model without a tokenizer. It has no ids and refuses texts."""

    def __init__(self) -> None:
        super().__init__(Tokenizer(models.BPE()).to_str())

    def encode(self, text: str) -> np.ndarray:
        raise BadInput("text", text[:40], "token ids: this model has no tokenizer.json")


AnyTokenizer = ByteTokenizer | JsonTokenizer


def _plain(content: str) -> Tokenizer:
    """Load a tokenizer without truncation, padding and randomness (dropout of merges, sampling).

    Its post-processor is removed, because `JsonTokenizer.start` replaces it, and because a template
    may repeat the text.
    """
    inner = Tokenizer.from_str(content)
    inner.post_processor = None
    inner.no_padding()
    inner.no_truncation()
    for name in ("dropout", "alpha", "nbest_size"):
        if getattr(inner.model, name, None) is not None:
            setattr(inner.model, name, None)
    return inner


def _start(processor: Any) -> tuple[int, ...]:
    """Return the ids that a post-processor puts before a text. Raises ValueError if that is
    ambiguous."""
    if not isinstance(processor, dict):
        return ()
    if "processors" in processor:
        found = [ids for ids in map(_start, processor["processors"]) if ids]
        if len(found) > 1:
            raise ValueError("two parts of its post_processor put something before a text")
        return found[0] if found else ()
    if "cls" in processor:
        return (processor["cls"][1],)
    before: list[int] = []
    for piece in processor.get("single", ()):
        if "Sequence" not in piece:
            before += processor["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        elif piece["Sequence"]["id"] == "A":
            return tuple(before)
        else:
            raise ValueError("the post_processor of a text alone names a second text")
    return ()


def _spells_one(inner: Tokenizer, special: Iterable[str]) -> bool:
    """Whether the model tokenises the text of a special token, other than the unknown token, to
    that token."""
    unknown = getattr(inner.model, "unk_token", None)
    return any(
        text != unknown and any(piece.value == text for piece in inner.model.tokenize(text))
        for text in special
    )


def _without_words(model: dict[str, Any], words: set[str]) -> models.Model:
    """Return the model of a file without these words, except the unknown token. The other words
    keep their ids."""
    vocab = model["vocab"]
    if isinstance(vocab, list):  # Unigram: an id is the place in the list
        kept = vocab[model["unk_id"]][0] if model.get("unk_id") is not None else None
        words = words - {kept}
        vocab = [["", score] if word in words else [word, score] for word, score in vocab]
    else:
        words = words - {model.get("unk_token")}
        vocab = {word: token for word, token in vocab.items() if word not in words}
    changed = model | {"vocab": vocab}
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        changed["merges"] = [[one, two] for one, two in pairs if not {one, two, one + two} & words]
    return Tokenizer.from_str(json.dumps({"version": "1.0", "model": changed})).model


def _require_one_name(found: JsonTokenizer, where: str) -> None:
    """Raise BadInput if two tokens have the same id."""
    words = found.inner.get_vocab(with_added_tokens=False)
    added = [(token["content"], token["id"]) for token in found.settings.get("added_tokens") or ()]
    # An added token may also be in the vocabulary. See `_without_words` for the empty word.
    more = {(word, token) for word, token in added if words.get(word) != token}
    ids = [*words.values(), *(token for _, token in more)]
    if len(set(ids)) == len(ids):
        return
    names: dict[int, str] = {}
    for word, token in sorted({*words.items(), *more}):
        if word and names.setdefault(token, word) != word:
            given = f"{names[token]!r} and {word!r}, both with id {token}"
            raise BadInput(where, given, "an id of its own for each token")


def _finished(inner: Tokenizer, use_regex: bool = True) -> Tokenizer:
    """Add the byte alphabet, and `BEGIN` before each document."""
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([BEGIN])
    begin = (BEGIN, inner.token_to_id(BEGIN))
    inner.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[begin]
    )
    return inner


def parse_tokenizer(text: str, where: str) -> AnyTokenizer:
    """Parse the content of a tokenizer.json. Raises BadInput if it can't be used.

    where: name of the file in errors
    """
    byte_level = ByteTokenizer()
    if text == byte_level.content:
        return byte_level
    allowed = "a tokenizer.json of Hugging Face's tokenizers"
    with telling_tokenizer_errors(where, "a file that can't be used", quiet=True):
        found = JsonTokenizer(text)
        require_bounded(found.settings, where)
        size = found.vocab_size
        if size > MOST_IDS:
            raise BadInput(where, f"an id of {size - 1:,}", f"ids below {MOST_IDS:,}")
        _require_one_name(found, where)
        if max(found.start, default=-1) >= size:
            raise BadInput(where, f"a template with id {max(found.start)}", f"ids below {size}")
        # Errors in regular expressions appear only when they are used.
        _ = found.text_vocab_size
        found.inner.encode("A text, déjà vu: 1 + 1\n")
        found.inner.decode_batch([[token] for token in range(min(size, 300))])
    if not size:
        raise BadInput(where, "an empty vocabulary", allowed)
    return found


def load_tokenizer(path: Path) -> AnyTokenizer:
    """Load a tokenizer.json, or the one in a folder. Raises BadInput if it can't be used."""
    path = path / "tokenizer.json" if path.is_dir() else path
    require_regular_file(path, "tokenizer")
    try:
        if path.exists() and not path.is_file():
            raise BadInput("tokenizer", str(path), "a tokenizer.json, which is an ordinary file")
        size = path.stat().st_size if path.exists() else 0
        if size > MOST_BYTES:
            raise BadInput("tokenizer", str(path), f"at most {MOST_BYTES:,} bytes, not {size:,}")
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise BadInput("tokenizer", str(path), f"a tokenizer.json ({reason})") from None
    return parse_tokenizer(text, str(path))


def find_tokenizer(path: Path) -> AnyTokenizer:
    """Load a tokenizer.json; `NoTokenizer` if there is none. Raises BadInput for a bad file."""
    return load_tokenizer(path) if path.exists() else NoTokenizer()


def train_bpe(texts: Iterable[str], vocab_size: int) -> JsonTokenizer:
    """Train a byte-level BPE on at most the first 256 MiB of text.

    The tokenizer has fewer ids than requested if no pairs are left to merge. Raises BadInput for a
    vocabulary below 257, which are the ids of the bytes and the begin token.
    """
    if vocab_size < 257:
        raise BadInput("vocab_size", vocab_size, "at least 257: the bytes and the begin token")
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
