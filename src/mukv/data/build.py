"""Build a token file: read sources in order, tokenise in parallel, write two streams.

A document belongs to validation if a hash of its text falls below the held-out fraction, whatever
else is in the corpus. A text beyond 1 MiB is assigned block by block (64 KiB); neighbouring blocks
of the same split stay one document. If that leaves a split empty (few documents), the end of the
tokens is held out instead. Threads suffice because `tokenizers` releases Python's lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.progress import DownloadColumn, Progress, SpinnerColumn, TransferSpeedColumn

from mukv.core.errors import BadInput, nearest_name, telling_disk_errors
from mukv.core.version import VERSION
from mukv.data import tokens as layout
from mukv.data.selection import Selection
from mukv.data.text import TextPiece, pieces
from mukv.data.tokenizer import AnyTokenizer, ByteTokenizer, load_tokenizer, train_bpe
from mukv.data.tokens import TokenFile, is_token_file, open_tokens
from mukv.show.terminal import Console, column
from mukv.storage.files import new_folder, write_atomic

TASK_BYTES = 1 << 18
"""Bytes of text that a thread tokenises at once."""
ReportBytes = Callable[[int], None]
"""Callback that receives the bytes of text written so far."""


def build_tokens(
    sources: Sequence[str],
    out: Path,
    tokenizer: str | AnyTokenizer = "bytes",
    field: str = "text",
    validation: float = 0.05,
    on_invalid: str = "strict",
    workers: int | None = None,
    overwrite: bool = False,
    report: ReportBytes | None = None,
    selection: Selection | None = None,
    encode: Encode | None = None,
) -> TokenFile:
    """Write the token file `out` and open it. Its content does not depend on `workers`.

    sources: see `mukv.data.text`
    tokenizer: `bytes`, `bpe:SIZE` (trained on the sources), the path of a tokenizer.json, or a
        loaded tokenizer
    field: name of the text in JSONL, Parquet and data sets
    validation: fraction of the text that is held out, between 0 and 1
    on_invalid: treatment of text that is not UTF-8; see `pieces`
    workers: threads; None means one per core
    overwrite: whether a token file of other content at `out` is replaced; if false, it is an error.
        A token file of the same content is kept.
    report: called with the bytes written so far
    selection: which documents are kept; None means all
    encode: function that returns the `Ids` of some documents, begin tokens included, with the
        learned ones; None means the tokenizer's ids, which are all learned

    What remote sources send is kept in the folder `OUT.spool` until the token file is complete, so
    that a further call after a failure or a kill goes on there. Nothing else is left behind by
    a failure. Raises BadInput and Failed.
    """
    selection = selection or Selection()
    spools = out.with_name(f"{out.name}.spool")
    if not 0 < validation < 1:
        raise BadInput("validation", validation, "a fraction between 0 and 1")
    if workers is not None and workers < 1:
        raise BadInput("workers", workers, "at least 1")
    with telling_disk_errors(out):
        _check_free(out)

    def read() -> Iterator[TextPiece]:
        return selection.of(pieces(sources, field, on_invalid, spools))

    try:
        with new_folder(out, overwrite) as folder:
            chosen = make_tokenizer(tokenizer, read) if isinstance(tokenizer, str) else tokenizer
            threads = workers or os.cpu_count() or 1
            encoded = _encoded(read(), encode or partial(_whole, chosen), validation, threads)
            counts = _write(folder, chosen, encode is not None, encoded, validation, report)
            write_atomic(folder / "tokenizer.json", chosen.content)
            stamp = layout.fingerprint(folder)
            meta = {
                "format": layout.FORMAT,
                "version": layout.VERSION,
                "dtype": layout.dtype_name(chosen.vocab_size),
                "vocab_size": chosen.vocab_size,
                **{name: vars(count) for name, count in counts.items()},
                "fingerprint": stamp,
                "sources": list(sources),
                "validation_share": validation,
                "selection": selection.asked,
                "created_by": f"mukv {VERSION}",
            }
            write_atomic(folder / "meta.json", json.dumps(meta, indent=2) + "\n")
            _check_same(out, stamp, overwrite)
    except _AlreadyThere:
        pass
    shutil.rmtree(spools, ignore_errors=True)
    return open_tokens(out)


def default_corpus(
    cache: Path, tokenizer: AnyTokenizer | None = None, report: ReportBytes | None = None
) -> TokenFile:
    """Return the Python library's own source, built in the folder `cache` on first use.

    tokenizer: None means bytes
    """
    name = f"stdlib-{platform.python_version()}"
    if tokenizer is None or isinstance(tokenizer, ByteTokenizer):
        return _kept(["stdlib"], cache / name, "bytes", report)
    stamp = hashlib.sha256(tokenizer.content.encode()).hexdigest()[:16]
    return _kept(["stdlib"], cache / f"{name}-{stamp}", tokenizer, report)


def text_tokens(
    source: str, tokenizer: AnyTokenizer, cache: Path, report: ReportBytes | None = None
) -> TokenFile:
    """Return a source's text in the ids of a tokenizer, built in the folder `cache` on first use.

    source: see `mukv.data.text`. The name of the token file is a hash of text and tokenizer, so
    that a changed text is another file. Raises BadInput for a source that can't be read.
    """
    digest = hashlib.sha256(tokenizer.content.encode())
    for piece in pieces([source]):
        digest.update(f"{piece.first} {len(piece.data)} ".encode() + piece.data)
    return _kept([source], cache / "texts" / digest.hexdigest()[:16], tokenizer, report)


def _kept(
    sources: Sequence[str], path: Path, tokenizer: str | AnyTokenizer, report: ReportBytes | None
) -> TokenFile:
    """Open a token file of the cache, or build it."""
    if not is_token_file(path):
        # Processes that start together may each build the file; the first to finish writes it.
        try:
            build_tokens(sources, path, tokenizer, report=report)
        except (BadInput, OSError):
            if not is_token_file(path):
                raise
    return open_tokens(path)


def make_tokenizer(spec: str, read: Callable[[], Iterable[TextPiece]]) -> AnyTokenizer:
    """Make a tokenizer from `bytes`, `bpe:SIZE` (trained on the texts that `read` yields) or the
    path of a tokenizer.json.
    """
    if spec == "bytes":
        return ByteTokenizer()
    kind, _, size = spec.partition(":")
    if kind != "bpe" and Path(spec).exists():
        return load_tokenizer(Path(spec))
    if kind != "bpe" or not (size.isdecimal() and size.isascii() and len(size) < 9):
        allowed = "bytes, bpe:SIZE such as bpe:8192, or the path of a tokenizer.json"
        raise BadInput("tokenizer", spec, allowed, nearest_name(spec, ["bytes", "bpe:8192"]))
    try:
        return train_bpe((piece.data.decode() for piece in read()), int(size))
    except BadInput as error:
        if error.where != "vocab_size":
            raise
        raise BadInput("tokenizer", spec, error.allowed) from None


@contextmanager
def speed_meter(title: str, console: Console | None = None) -> Iterator[ReportBytes]:
    """Show megabytes and megabytes per second on a terminal, for `build_tokens(report=...)`."""
    columns = SpinnerColumn(), column("task.description"), DownloadColumn()
    progress = Progress(
        *columns, TransferSpeedColumn(), console=console or Console(stderr=True), transient=True
    )
    with progress:
        task = progress.add_task(title, total=None)
        yield lambda done: progress.update(task, completed=done)


class _AlreadyThere(Exception):
    """Raised if a token file of the same content exists; it is then kept."""


def _check_free(out: Path) -> None:
    if out.is_dir() and not is_token_file(out) and any(out.iterdir()):
        raise BadInput(str(out), "a folder in use", "a new path, or a token file to replace")
    if out.exists() and not out.is_dir():
        raise BadInput(str(out), "a file in the way", "a new path, or a token file to replace")


def _check_same(out: Path, stamp: str, overwrite: bool) -> None:
    if not is_token_file(out):
        return
    with suppress(BadInput):  # a damaged file is never the same
        if open_tokens(out).fingerprint == stamp:
            raise _AlreadyThere
    if not overwrite:
        raise BadInput(
            str(out), "a token file of other content", "another path, or `overwrite` to replace it"
        )


class Ids(NamedTuple):
    """The ids of a piece of text.

    ids: [token]
    bytes: UTF-8 bytes of the text
    learned: which ids count in the loss, bool [token]; None for all
    """

    ids: np.ndarray
    bytes: int
    learned: np.ndarray | None = None


Encode = Callable[[Sequence[TextPiece]], list[Ids]]
"""Function that encodes some pieces; threads call it."""


class _Encoded(NamedTuple):
    """A piece of text in ids.

    first: whether the piece begins a document
    held_out: whether the piece belongs to validation
    """

    found: Ids
    first: bool
    held_out: bool


def _whole(tokenizer: AnyTokenizer, task: Sequence[TextPiece]) -> list[Ids]:
    """Encode texts, which are learned whole."""
    return [Ids(tokenizer.encode(piece.data.decode()), len(piece.data)) for piece in task]


def _encoded(
    texts: Iterable[TextPiece], encode: Encode, share: float, workers: int
) -> Iterator[_Encoded]:
    """Yield the ids of each text, in order, with a few tasks per thread in flight."""

    def run(task: list[TextPiece]) -> list[_Encoded]:
        return [
            _Encoded(found, piece.first, held_out(piece.data, share))
            for piece, found in zip(task, encode(task), strict=True)
        ]

    pool = ThreadPoolExecutor(workers)
    pending: deque[Future[list[_Encoded]]] = deque()
    try:
        for task in _tasks(texts):
            pending.append(pool.submit(run, task))
            if len(pending) > 3 * workers:
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _tasks(texts: Iterable[TextPiece]) -> Iterator[list[TextPiece]]:
    task: list[TextPiece] = []
    size = 0
    for piece in texts:
        task.append(piece)
        size += len(piece.data)
        if size >= TASK_BYTES:
            yield task
            task, size = [], 0
    if task:
        yield task


def held_out(data: bytes, share: float) -> bool:
    """Whether a text belongs to validation: a function only of the text and the fraction."""
    digest = hashlib.blake2b(data, digest_size=8, person=b"mukv split").digest()
    return int.from_bytes(digest, "little") < share * 2**64


@dataclass
class _Count:
    """Counts of one stream, with the keys of meta.json."""

    tokens: int = 0
    documents: int = 0
    bytes: int = 0


def _write(
    folder: Path,
    tokenizer: AnyTokenizer,
    masked: bool,
    encoded: Iterable[_Encoded],
    share: float,
    report: ReportBytes | None,
) -> dict[str, _Count]:
    """Write both streams and return their counts.

    masked: whether the pieces have their begin tokens, and learned ones
    """
    dtype = layout.DTYPES[layout.dtype_name(tokenizer.vocab_size)]
    begin = np.array(() if masked else tokenizer.start, dtype)
    counts = {name: _Count() for name in layout.SPLITS}
    kinds = ("bin", "starts", "learned") if masked else ("bin", "starts")
    files = {
        kind: {name: (folder / f"{name}.{kind}").open("wb") for name in layout.SPLITS}
        for kind in kinds
    }
    ids, starts = files["bin"], files["starts"]
    previous = None
    try:
        for piece in encoded:
            if not len(piece.found.ids):
                previous = None
                continue
            name = layout.SPLITS[piece.held_out]
            count = counts[name]
            if piece.first or name != previous:
                starts[name].write(np.array(count.tokens, layout.START_DTYPE).tobytes())
                ids[name].write(begin.tobytes())
                count.tokens += len(begin)
                count.documents += 1
            ids[name].write(piece.found.ids.astype(dtype).tobytes())
            if piece.found.learned is not None:
                learned = piece.found.learned.astype(layout.LEARNED_DTYPE)
                files["learned"][name].write(learned.tobytes())
            count.tokens += len(piece.found.ids)
            count.bytes += piece.found.bytes
            previous = name
            if report:
                report(sum(each.bytes for each in counts.values()))
    finally:
        for file in chain(*(each.values() for each in files.values())):
            file.close()
    if not all(count.tokens for count in counts.values()):
        counts = _hold_out_end(folder, tokenizer, kinds, counts, share)
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    return counts


def _hold_out_end(
    folder: Path,
    tokenizer: AnyTokenizer,
    kinds: Sequence[str],
    counts: dict[str, _Count],
    share: float,
) -> dict[str, _Count]:
    """Move the end of the only non-empty stream into validation. kinds: suffixes of its files"""
    train, validation = layout.SPLITS
    if counts[validation].tokens:
        for kind in kinds:
            os.replace(folder / f"{validation}.{kind}", folder / f"{train}.{kind}")
    full = counts[train] if counts[train].tokens else counts[validation]
    masked = "learned" in kinds
    begin = [] if masked else list(tokenizer.start)
    if full.tokens < len(begin) + 2:
        raise BadInput("SOURCE", f"{full.bytes} bytes of text", "at least two tokens of text")
    dtype = layout.DTYPES[layout.dtype_name(tokenizer.vocab_size)]
    cut = min(max(round(full.tokens * (1 - share)), len(begin) + 1), full.tokens - 1)
    starts = np.fromfile(folder / f"{train}.starts", layout.START_DTYPE)
    end: np.ndarray = np.fromfile(folder / f"{train}.bin", dtype, offset=cut * dtype.itemsize)
    kept = int(np.searchsorted(starts, cut))
    end_bytes = int(tokenizer.token_bytes()[end].sum(dtype=np.int64))
    end_starts = starts[kept:] - cut
    if not len(end_starts) or end_starts[0]:
        end = np.concatenate([np.array(begin, dtype), end])
        end_starts = np.concatenate([np.zeros(1, layout.START_DTYPE), end_starts + len(begin)])
    (folder / f"{validation}.bin").write_bytes(end.tobytes())
    (folder / f"{validation}.starts").write_bytes(end_starts.astype(layout.START_DTYPE).tobytes())
    if masked:
        learned = (folder / f"{train}.learned").read_bytes()[cut:]
        (folder / f"{validation}.learned").write_bytes(learned)
        os.truncate(folder / f"{train}.learned", cut)
    os.truncate(folder / f"{train}.bin", cut * dtype.itemsize)
    os.truncate(folder / f"{train}.starts", kept * layout.START_DTYPE.itemsize)
    return {
        train: _Count(cut, kept, full.bytes - end_bytes),
        validation: _Count(len(end), len(end_starts), end_bytes),
    }
