"""A token file: a folder with two memory-mapped streams of tokens, training and validation.

`train.bin` and `validation.bin` hold ids, `*.starts` the index of each document's first token,
`*.learned` which tokens of conversations are learned, tokenizer.json the vocabulary, meta.json
counts and fingerprint (see docs/formats.md). Opening
checks all sizes and document starts, but not the ids: `verify` checks all ids, and `Batches` the
ids that it returns.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mukv.core.errors import BadInput
from mukv.data.sources import nearest_path
from mukv.data.tokenizer import AnyTokenizer, load_tokenizer
from mukv.storage.files import clear_leftovers

FORMAT, VERSION = "mukv-tokens", 1
SPLITS = ("train", "validation")
DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
COUNTS = ("tokens", "documents", "bytes")
START_DTYPE = np.dtype("<i8")
CONTENT = (*(f"{s}.{kind}" for s in SPLITS for kind in ("bin", "starts")), "tokenizer.json")
LEARNED = tuple(f"{split}.learned" for split in SPLITS)
"""Files that the fingerprint covers, in this order; LEARNED only where they exist."""
LEARNED_DTYPE = np.dtype("u1")
_unchanged: set[tuple[Any, ...]] = set()
"""Fingerprints that were verified, with the files' inodes, sizes and times at that moment."""


def dtype_name(vocab_size: int) -> str:
    """Return the name of the smallest dtype that holds every id."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclass(frozen=True, eq=False)
class Stream:
    """One split: documents one after another, each preceded by the tokenizer's `start` tokens.

    tokens: ids [token], memory-mapped
    starts: index of each document's first token, int64 [document], ascending from 0
    bytes: UTF-8 bytes of the text
    learned: 1 for tokens that count in the loss and 0 for others, uint8 [token], memory-mapped;
        None if all count
    """

    tokens: np.ndarray
    starts: np.ndarray
    bytes: int
    learned: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class TokenFile:
    """An open token file.

    fingerprint: SHA-256 of its content
    sources: sources from which it was made, as typed
    """

    path: Path
    train: Stream
    validation: Stream
    tokenizer: AnyTokenizer
    fingerprint: str
    sources: tuple[str, ...]

    @property
    def vocab_size(self) -> int:
        return self.tokenizer.vocab_size

    @property
    def bytes(self) -> int:
        """UTF-8 bytes of all text."""
        return self.train.bytes + self.validation.bytes

    def split(self, name: str) -> Stream:
        """Return the stream called "train" or "validation"."""
        return {"train": self.train, "validation": self.validation}[name]

    def token_bytes(self, vocab_size: int | None = None) -> np.ndarray:
        """Return the number of UTF-8 bytes of each id, int32 [vocab], padded with zeros to the
        vocabulary of a model.
        """
        return self.tokenizer.token_bytes(vocab_size)

    def require_unchanged(self) -> None:
        """Raise BadInput unless the content has the recorded fingerprint.

        All files are read, which takes 0.6 s per GB. Files that have not changed since are not read
        again in this process.
        """
        files = [(self.path / name).stat() for name in content(self.path)]
        state = (self.fingerprint, *((s.st_ino, s.st_size, s.st_mtime_ns) for s in files))
        if state in _unchanged:
            return
        actual = fingerprint(self.path)
        if actual != self.fingerprint:
            allowed = (
                f"its fingerprint is {self.fingerprint[:12]}, that of its content {actual[:12]}"
            )
            raise BadInput(str(self.path), "a changed token file", f"{allowed}: build it again")
        _unchanged.add(state)

    def verify(self) -> None:
        """Read everything, ids included; raise BadInput unless the file is intact."""
        self.require_unchanged()
        for name in SPLITS:
            for start in range(0, len(self.split(name).tokens), 1 << 24):
                check_ids(self, self.split(name).tokens[start : start + (1 << 24)])


def check_ids(file: TokenFile, ids: np.ndarray) -> None:
    """Raise BadInput for ids beyond the tokenizer's vocabulary."""
    if ids.size and ids.max() >= file.vocab_size:
        raise BadInput(
            str(file.path),
            f"id {ids.max()}",
            f"the tokenizer's largest id is {file.vocab_size - 1}",
        )


def open_tokens(path: Path) -> TokenFile:
    """Open a token file. Raises BadInput where it is missing, truncated or of another format."""
    meta = _read_meta(path)
    tokenizer = load_tokenizer(path / "tokenizer.json")
    dtype, sources, stamp = dtype_name(tokenizer.vocab_size), meta["sources"], meta["fingerprint"]
    right = {
        "vocab_size": meta["vocab_size"] == tokenizer.vocab_size,
        "dtype": meta["dtype"] == dtype,
        "fingerprint": isinstance(stamp, str),
        "sources": isinstance(sources, list) and all(isinstance(each, str) for each in sources),
        **{split: _are_counts(meta[split]) for split in SPLITS},
    }
    for key, fits in right.items():
        if not fits:
            raise BadInput(
                f"{path}/meta.json: {key}", meta[key], "a value that agrees with the other files"
            )
    streams = {name: _open_stream(path, name, DTYPES[dtype], meta[name]) for name in SPLITS}
    return TokenFile(path, **streams, tokenizer=tokenizer, fingerprint=stamp, sources=(*sources,))


def is_token_file(path: Path) -> bool:
    """Whether a folder has the meta.json of a token file; only `open_tokens` checks the rest."""
    try:
        _read_meta(path)
    except BadInput:
        return False
    return True


def content(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that the fingerprint covers, in order."""
    return (*CONTENT, *(name for name in LEARNED if (folder / name).exists()))


def fingerprint(folder: Path) -> str:
    """Compute the SHA-256 of the content: ids, starts, tokenizer and learned tokens."""
    total = hashlib.sha256()
    for name in content(folder):
        with (folder / name).open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.exists():
        clear_leftovers(path.parent)  # restores a file whose replacement was interrupted
    try:
        meta = json.loads((path / "meta.json").read_text("utf-8"))
    except OSError:
        near = None if path.exists() else nearest_path(path)
        allowed = "a token file: a folder that `mukv data` wrote"
        raise BadInput("data.path", str(path), allowed, near) from None
    except (ValueError, RecursionError):
        raise BadInput(f"{path}/meta.json", "not JSON", "the file that `mukv data` wrote") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        raise BadInput(f"{path}/meta.json", "another format", f"format must be {FORMAT!r}")
    if meta.get("version") != VERSION:
        raise BadInput(f"{path}/meta.json", meta.get("version"), f"version must be {VERSION}")
    for key in ("dtype", "vocab_size", "fingerprint", "sources", *SPLITS):
        if key not in meta:
            raise BadInput(f"{path}/meta.json: {key}", None, "this key is required")
    return meta


def _are_counts(value: Any) -> bool:
    """Whether `value` has all counts of a stream, as integers of at least 0."""
    return isinstance(value, dict) and all(
        type(value.get(key)) is int and value[key] >= 0 for key in COUNTS
    )


def _open_stream(path: Path, name: str, dtype: np.dtype, counts: dict[str, int]) -> Stream:
    tokens = _map(path / f"{name}.bin", dtype, counts["tokens"])
    starts = _map(path / f"{name}.starts", START_DTYPE, counts["documents"])
    ascending = len(starts) and starts[0] == 0 and starts[-1] < len(tokens)
    if not ascending or not np.all(starts[1:] > starts[:-1]):
        raise BadInput(
            f"{path}/{name}.starts", "a damaged file", "document starts must ascend from 0"
        )
    path = path / f"{name}.learned"
    learned = _map(path, LEARNED_DTYPE, counts["tokens"]) if path.exists() else None
    return Stream(tokens, starts, counts["bytes"], learned)


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    try:
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            expected = f"meta.json says {count * dtype.itemsize}: truncated, or of another file"
            raise BadInput(str(path), f"{size} bytes", expected)
        # An empty file can't be mapped. The map becomes a plain array, whose slices are faster.
        return np.asarray(np.memmap(path, dtype, "r")) if count else np.zeros(0, dtype)
    except OSError as error:
        raise BadInput(str(path), error.strerror, "a file that can be read") from None
