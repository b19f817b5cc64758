"""Token files are read as they were written; other files are refused."""

from __future__ import annotations

import errno
import json
import os
import shutil
from io import BufferedWriter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mukv.core.errors import BadInput, Failed
from mukv.data import build, text
from mukv.data.batches import Batches
from mukv.data.build import build_tokens, default_corpus, held_out
from mukv.data.text import pieces
from mukv.data.tokens import Stream, TokenFile, open_tokens

FILES = ("meta.json", "tokenizer.json", "train.bin", "train.starts", "validation.starts")


def contents(path: Path) -> dict[str, bytes]:
    return {each.name: each.read_bytes() for each in path.iterdir()}


def texts(file: TokenFile, stream: Stream) -> list[bytes]:
    documents = np.split(stream.tokens, stream.starts[1:])
    assert all(ids[0] == file.tokenizer.start[0] for ids in documents)
    return [file.tokenizer.decode(ids.tolist()).encode() for ids in documents]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_every_document_is_in_the_split_of_its_hash(folder: Path, tmp_path: Path, tokenizer: str):
    file = build_tokens([str(folder)], tmp_path / "t", tokenizer, validation=0.2)
    file.verify()
    given = [piece.data for piece in pieces([str(folder)])]
    assert texts(file, file.train) == [data for data in given if not held_out(data, 0.2)]
    assert texts(file, file.validation) == [data for data in given if held_out(data, 0.2)]
    assert file.validation.bytes == sum(len(data) for data in given if held_out(data, 0.2))
    assert file.bytes == sum(map(len, given))


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_the_result_does_not_depend_on_the_workers(
    folder: Path, tmp_path: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(build, "TASK_BYTES", 100)
    for workers in (1, 3):
        build_tokens([str(folder)], tmp_path / str(workers), tokenizer, workers=workers)
    assert contents(tmp_path / "1") == contents(tmp_path / "3")


def test_a_long_text_is_split_by_blocks_and_its_neighbours_stay_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(text, "WHOLE_BYTES", 4000)
    monkeypatch.setattr(text, "BLOCK_BYTES", 500)
    content = b"".join(b"line %d\n" % number for number in range(5000))
    (tmp_path / "long").write_bytes(content)
    blocks = [piece.data for piece in pieces([str(tmp_path / "long")])]
    file = build_tokens([str(tmp_path / "long")], tmp_path / "t", validation=0.2)
    held = [held_out(block, 0.2) for block in blocks]
    runs = 1 + sum(before != after for before, after in pairwise(held))
    assert len(file.train.starts) + len(file.validation.starts) == runs
    assert sorted(b"".join(texts(file, file.train) + texts(file, file.validation))) == sorted(
        content
    )
    assert 0.1 < file.validation.bytes / file.bytes < 0.3


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("content", ["ab", "x" * 1000])
def test_neither_split_is_empty(tmp_path: Path, share: float, content: str):
    (tmp_path / "a").write_text(content)
    file = build_tokens([str(tmp_path / "a")], tmp_path / "t", validation=share)
    file.verify()
    assert b"".join(texts(file, file.train) + texts(file, file.validation)).decode() == content
    assert file.train.bytes > 0
    assert file.validation.bytes == pytest.approx(len(content) * share, abs=2)


def test_the_validation_split_may_begin_within_a_document(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for name in "abcd":
        (source / name).write_text(name * 10)
    file = build_tokens([str(source)], tmp_path / "t", validation=1e-9)
    assert texts(file, file.train) == [b"a" * 10, b"b" * 10, b"c" * 10, b"d" * 9]
    assert texts(file, file.validation) == [b"d"]


def test_existing_files_are_kept_refused_or_replaced(folder: Path, tmp_path: Path):
    out = tmp_path / "t"
    first = build_tokens([str(folder)], out)
    made = (out / "meta.json").stat().st_ino
    assert build_tokens([str(folder)], out).fingerprint == first.fingerprint
    assert (out / "meta.json").stat().st_ino == made
    with pytest.raises(BadInput, match="other content"):
        build_tokens([str(folder)], out, "bpe:260")
    assert contents(out)["train.bin"] == first.train.tokens.tobytes()
    again = build_tokens([str(folder)], out, "bpe:260", overwrite=True)
    assert again.fingerprint != first.fingerprint
    for path in (folder, folder / "00.txt"):
        with pytest.raises(BadInput, match="new path"):
            build_tokens([str(folder)], path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_the_default_corpus_is_built_once(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(build.pieces.__globals__, "open_source", lambda *_: _few(folder))
    first = default_corpus(tmp_path)
    monkeypatch.setattr(build, "build_tokens", None)
    assert default_corpus(tmp_path).fingerprint == first.fingerprint


def _few(folder: Path):
    for path in sorted(folder.iterdir()):
        yield path.name, path.open("rb")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"validation": 0.0}, "validation"),
        ({"validation": 1.0}, "validation"),
        ({"workers": 0}, "workers"),
        ({"tokenizer": "byts"}, "did you mean 'bytes'"),
        ({"tokenizer": "bpe:"}, "bpe:SIZE"),
        ({"tokenizer": "bpe:10"}, "257"),
        ({"on_invalid": "no"}, "strict"),
    ],
)
def test_bad_options_leave_nothing_behind(folder: Path, tmp_path: Path, options, says: str):
    with pytest.raises(BadInput, match=says):
        build_tokens([str(folder)], tmp_path / "t", **options)
    assert not list(tmp_path.iterdir())


def test_an_empty_corpus_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / "empty").touch()
    for sources in ([str(tmp_path / "empty")], []):
        with pytest.raises(BadInput, match="0 bytes of text"):
            build_tokens(sources, tmp_path / "t")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize(
    ("number", "error", "says"),
    [(errno.ENOSPC, Failed, "disk is full"), (errno.EACCES, BadInput, "can't be written")],
)
def test_a_full_disk_leaves_nothing_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, error, says: str
):
    class Refusing(BufferedWriter):
        def write(self, _):
            raise OSError(number, os.strerror(number))

    real = Path.open

    def refuse(path: Path, mode: str = "r", *rest):
        file = real(path, mode, *rest)
        return Refusing(file.detach()) if path.suffix == ".bin" and mode == "wb" else file

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(error, match=says):
        build_tokens([str(folder)], tmp_path / "t")
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_folder_should_be(folder: Path, tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match="in the way"):
        build_tokens([str(folder)], tmp_path / "file" / "t")


def copied(file: TokenFile, tmp_path: Path) -> Path:
    return shutil.copytree(file.path, tmp_path / "copy", dirs_exist_ok=True)


def test_missing_files(corpus: TokenFile, tmp_path: Path):
    for name in FILES:
        path = copied(corpus, tmp_path)
        (path / name).unlink()
        with pytest.raises(BadInput):
            open_tokens(path)
    with pytest.raises(BadInput, match=r"did you mean '.*copy'"):
        open_tokens(tmp_path / "cpy")


def test_a_truncated_file(corpus: TokenFile, tmp_path: Path):
    path = copied(corpus, tmp_path)
    os.truncate(path / "train.bin", 100)
    with pytest.raises(BadInput, match=r"train.bin: got '100 bytes'.*truncated"):
        open_tokens(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "other"),
        ("version", 99),
        ("dtype", "float32"),
        ("vocab_size", 10),
        ("fingerprint", None),
        ("sources", "stdlib"),
        ("train", {"tokens": -2, "documents": 1, "bytes": 0}),
        ("train", {"tokens": True, "documents": 1, "bytes": 0}),
        ("train", []),
    ],
)
def test_foreign_meta_data(corpus: TokenFile, tmp_path: Path, key: str, value: object):
    path = copied(corpus, tmp_path)
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps(meta | {key: value}))
    with pytest.raises(BadInput, match=key):
        open_tokens(path)
    (path / "meta.json").write_text(json.dumps({k: v for k, v in meta.items() if k != key}))
    with pytest.raises(BadInput, match=key):
        open_tokens(path)


def test_ids_beyond_the_vocabulary(corpus: TokenFile, tmp_path: Path):
    path = copied(corpus, tmp_path)
    ids = np.memmap(path / "train.bin", "<u2", "r+")
    ids[:] = 257
    ids.flush()
    file = open_tokens(path)
    with pytest.raises(BadInput, match="257"):
        Batches(file, seed=0, batch=2, length=8).at(0)
    with pytest.raises(BadInput, match="content"):
        file.verify()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.sampled_from(FILES),
    noise=st.binary(max_size=64),
    place=st.floats(0, 1),
    keep=st.booleans(),
)
def test_random_bytes_raise_nothing_but_bad_input(
    corpus: TokenFile, tmp_path: Path, name: str, noise: bytes, place: float, keep: bool
):
    path = copied(corpus, tmp_path)
    content = (path / name).read_bytes()
    start = int(place * (len(content) - 1))
    damaged = content[:start] + noise + content[start + len(noise) :] if keep else noise
    (path / name).write_bytes(damaged)
    try:
        file = open_tokens(path)
        batches = Batches(file, seed=0, batch=4, length=16)
        for batch in (batches.at(0), *batches.once(2)):
            assert batch.tokens.min() >= 0
            assert batch.tokens.max() < file.vocab_size
            assert batch.position.min() >= 0
        file.verify()
    except BadInput:
        return
    assert name == "meta.json" or damaged == content
