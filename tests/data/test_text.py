"""Documents do not depend on the format of a source; any other input gives one clear error line."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mukv.core.errors import BadInput
from mukv.data import text
from mukv.data.text import BLOCK_BYTES, WHOLE_BYTES, pieces

TEXTS = ["one", "zwei\nläuft", "", "三"]


def documents(*sources: object, **options: str) -> list[str]:
    return [piece.data.decode() for piece in pieces([str(each) for each in sources], **options)]


def test_all_formats_give_the_same_documents(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    for number, content in enumerate(TEXTS):
        (tmp_path / f"{number}.txt").write_text(content)
    lines = [json.dumps({"text": content, "n": 1}) for content in TEXTS]
    (tmp_path / "a.jsonl").write_text("\n\n".join(lines))
    parquet.write_table(arrow.table({"text": [*TEXTS, None]}), tmp_path / "a.parquet")
    expected = [content for content in TEXTS if content]
    files = [tmp_path / f"{number}.txt" for number in range(len(TEXTS))]
    assert documents(*files) == expected
    assert documents(tmp_path / "a.jsonl") == expected
    assert documents(tmp_path / "a.parquet") == expected
    assert documents(tmp_path) == expected * 3


def test_a_folder_leaves_out_hidden_and_binary_files(tmp_path: Path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "z.md").write_text("second")
    (tmp_path / "a.md").write_text("first")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "image").write_bytes(b"\x89PNG\0\0")
    assert documents(tmp_path) == ["first", "second"]


def test_stdlib_is_python_source_without_tests():
    names = [piece.name for piece in pieces(["stdlib"])]
    assert sum(len(piece.data) for piece in pieces(["stdlib"])) > 5_000_000
    assert all(name.endswith(".py") for name in names)
    assert not any("/test/" in name or "site-packages" in name for name in names)


def test_a_package_is_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "explosive"
    package.mkdir()
    (package / "__init__.py").write_text("raise SystemError")
    (package / "inner.py").write_text("x = 1")
    (tmp_path / "single.py").write_text("raise SystemError")
    monkeypatch.syspath_prepend(tmp_path)
    assert documents("package:explosive") == ["raise SystemError", "x = 1"]
    assert documents("package:explosive.inner") == ["x = 1"]
    assert documents("package:single") == ["raise SystemError"]


@pytest.mark.parametrize("invalid", [b"ab\xffc", b"\xc3", b"\xed\xa0\x80"])
def test_text_that_is_not_utf8(tmp_path: Path, invalid: bytes):
    (tmp_path / "a").write_bytes(invalid)
    (tmp_path / "b").write_text("good")
    with pytest.raises(BadInput, match=r"a: got 'byte 0x.* at offset \d"):
        documents(tmp_path)
    assert documents(tmp_path, on_invalid="skip") == ["good"]
    assert documents(tmp_path, on_invalid="replace")[0] == invalid.decode(errors="replace")
    with pytest.raises(BadInput, match="strict"):
        documents(tmp_path, on_invalid="strickt")


def test_the_offset_in_a_long_file(tmp_path: Path):
    place = WHOLE_BYTES + 3 * BLOCK_BYTES + 5
    (tmp_path / "a").write_bytes(b"a" * place + b"\xff" + b"a" * 100)
    with pytest.raises(BadInput, match=f"0xff at offset {place}'"):
        documents(tmp_path)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{", "a.jsonl:2.*JSON"),
        (b"[1]", "a.jsonl:2.*object"),
        (b'{"txet": "a"}', "a.jsonl:2: field.*'txet'"),
        (b'{"text": 3}', "a.jsonl:2: text.*3"),
        (b'{"text": "\xff"}', "a.jsonl:2.*0xff"),
        (b'{"text": "\\ud800"}', "a.jsonl:2.*0xed"),
        (b"[" * 100_000, "a.jsonl:2"),
    ],
)
def test_bad_jsonl(tmp_path: Path, line: bytes, says: str):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n' + line)
    with pytest.raises(BadInput, match=says):
        documents(tmp_path)


def test_bad_parquet(tmp_path: Path):
    parquet = pytest.importorskip("pyarrow.parquet")
    arrow = pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(BadInput, match=r"a.parquet"):
        documents(tmp_path)
    parquet.write_table(arrow.table({"txet": ["a"], "n": [1]}), tmp_path / "a.parquet")
    with pytest.raises(BadInput, match="did you mean 'txet'"):
        documents(tmp_path)
    with pytest.raises(BadInput, match=":1: n: got 1"):
        documents(tmp_path, field="n")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("stdlb", "did you mean 'stdlib'"),
        ("stdlib:re", "takes no name"),
        ("package:jsn", "did you mean 'json'"),
        ("package:", "importable"),
        ("package:sys", "source"),
        ("package:json.nothing", "source"),
    ],
)
def test_bad_names(source: str, says: str):
    with pytest.raises(BadInput, match=says):
        documents("stdlib", source)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(__import__("sys").modules, module, None)
    with pytest.raises(BadInput, match=r"mukv\[huggingface\]"):
        documents("hf:anything")
    (tmp_path / "a.parquet").touch()
    with pytest.raises(BadInput, match=r"mukv\[parquet\]"):
        documents(tmp_path)


@given(
    st.lists(
        st.sampled_from([b"\n", b" ", b"a", "é".encode(), "三".encode(), "𐍈".encode()]),
        max_size=150,
    ),
    st.integers(8, 39),
)
def test_blocks_join_to_the_text_and_keep_characters_whole(parts: list[bytes], block: int):
    data = b"".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "WHOLE_BYTES", 40)
        patch.setattr(text, "BLOCK_BYTES", block)
        found = [block for block, _ in text._blocks(io.BytesIO(data))]
    assert b"".join(found) == data
    assert all(each.decode() for each in found) or not data
    assert len(data) <= 40 or max(map(len, found)) <= block


@given(st.binary(max_size=200))
def test_random_bytes_are_cut_without_end(data: bytes):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "WHOLE_BYTES", 16)
        patch.setattr(text, "BLOCK_BYTES", 8)
        assert b"".join(block for block, _ in text._blocks(io.BytesIO(data))) == data
