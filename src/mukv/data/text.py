"""Sources of text: files, folders, Python packages and data sets become one stream of pieces.

A source is a string: a path, or `kind:name` with a kind of the table below. A source function
yields documents as open binary files, so that a text of any size is read bit by bit. To add a
source: one function, one table line. Order is deterministic: as given, then by sorted path.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pkgutil
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple, get_args

from mukv.core.errors import BadInput, nearest_name, unknown_name

WHOLE_BYTES = 1 << 20
"""A longer text is cut into blocks, so that a book of gigabytes never lies in memory."""
BLOCK_BYTES = 1 << 16
TESTS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
"""Folders that are not the standard library itself."""
Invalid = Literal["strict", "replace", "skip"]
Source = Iterator[tuple[str, BinaryIO]]
"""Names (for messages) and contents of documents."""


class Piece(NamedTuple):
    """Valid UTF-8 that is tokenised at once: a document, or a block of a long one."""

    name: str
    data: bytes
    first: bool
    """Whether a document begins here."""


def pieces(
    sources: Sequence[str], field: str = "text", on_invalid: str = "strict"
) -> Iterator[Piece]:
    """All documents of all sources, those beyond 1 MiB in blocks of 64 KiB cut at line ends.

    field: name of the text in JSONL, Parquet and data sets. on_invalid: what to do where a text
    is not UTF-8: "strict" raises BadInput, "replace" puts U+FFFD, "skip" leaves the piece out.
    Empty documents are left out. Raises BadInput for a source that can't be read.
    """
    if on_invalid not in get_args(Invalid):
        raise unknown_name("on_invalid", on_invalid, get_args(Invalid))
    for source in sources:
        for name, file in _open_source(source, field):
            first, offset = True, 0
            with file, _told(name):
                for block in _blocks(file):
                    valid = _valid(name, block, offset, on_invalid)
                    offset += len(block)
                    if valid:
                        yield Piece(name, valid, first)
                    first = not valid


def _open_source(source: str, field: str) -> Source:
    kind, _, name = source.partition(":")
    if kind in SOURCES:
        return SOURCES[kind](name, field)
    return _path(source, field)


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    """A document whole, or in blocks that end with a line, else before a space, else with a
    character."""
    rest = file.read(WHOLE_BYTES + 1)
    if len(rest) <= WHOLE_BYTES:
        yield rest
        return
    while rest:
        if len(rest) < BLOCK_BYTES:
            rest += file.read(WHOLE_BYTES)
        cut = min(len(rest), BLOCK_BYTES)
        if cut < len(rest):
            cut = rest.rfind(b"\n", 0, cut) + 1 or max(rest.rfind(b" ", 0, cut), 0) or cut
            # Continuation bytes of UTF-8 are 10xxxxxx; no character has more than three.
            for _ in range(3):
                cut -= rest[cut] & 0xC0 == 0x80
        yield rest[:cut]
        rest = rest[cut:]


def _valid(name: str, data: bytes, offset: int, on_invalid: str) -> bytes:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        if on_invalid == "skip":
            return b""
        if on_invalid == "replace":
            return data.decode(errors="replace").encode()
        place = offset + error.start
        given = f"byte 0x{data[error.start]:02x} at offset {place}"
        raise BadInput(
            name, given, "UTF-8 text; or say what to do with other text: replace or skip"
        ) from None
    return data


@contextmanager
def _told(name: str) -> Iterator[None]:
    """What the file system refuses while reading, in one line about `name`."""
    try:
        yield
    except OSError as error:
        raise BadInput(name, error.strerror or str(error), "a text that can be read") from error


def _path(source: str, field: str) -> Source:
    """A file by its suffix, or all of a folder: hidden and binary files are left out."""
    path = Path(source)
    if not path.exists():
        kinds = [*SOURCES, *(["package:", "hf:"])]
        siblings = (
            [str(path.parent / entry) for entry in os.listdir(path.parent)]
            if path.parent.is_dir()
            else []
        )
        raise BadInput(
            "SOURCE",
            source,
            "a file or folder, stdlib, package:NAME or hf:NAME",
            nearest_name(source, [*siblings, *kinds]),
        )
    if not path.is_dir():
        yield from _file(path, field)
    elif any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json")):
        yield from _hugging_face(source, field)
    else:
        for file in _walk(path):
            if file.suffix in FORMATS or not _binary(file):
                yield from _file(file, field)


def _file(path: Path, field: str) -> Source:
    with _told(str(path)):
        yield from FORMATS.get(path.suffix, _text)(path, field)


def _walk(folder: Path, leave_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Regular files in sorted order, without hidden ones and __pycache__."""

    def stop(error: OSError) -> None:
        raise BadInput(error.filename, error.strerror, "a folder that can be read")

    for parent, folders, files in os.walk(folder, onerror=stop):
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and name != "__pycache__" and name not in leave_out
        )
        for name in sorted(files):
            path = Path(parent, name)
            if not name.startswith(".") and path.is_file():
                yield path


def _binary(path: Path) -> bool:
    """Whether the file begins as no text does, by the rule of git: a NUL in its first 8 KiB."""
    with _told(str(path)), path.open("rb") as file:
        return b"\0" in file.read(8192)


def _text(path: Path, field: str) -> Source:
    with path.open("rb") as file:
        yield str(path), file


def _jsonl(path: Path, field: str) -> Source:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                # Bytes that are not UTF-8 pass through to where they are judged.
                record = json.loads(line.decode(errors="surrogateescape"))
            except (ValueError, RecursionError) as error:
                raise BadInput(where, _start(line), f"one JSON object a line ({error})") from None
            if not isinstance(record, dict):
                raise BadInput(where, _start(line), "one JSON object a line")
            if field not in record:
                raise unknown_name(f"{where}: field", field, map(str, record))
            yield _record(where, field, record[field])


def _start(line: bytes) -> str:
    return line[:40].decode(errors="replace").strip()


def _record(where: str, field: str, value: object) -> tuple[str, BinaryIO]:
    if value is None:
        return where, io.BytesIO()
    if not isinstance(value, str):
        raise BadInput(f"{where}: {field}", value, "text")
    try:
        data = value.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that JSON spelt out: \ud800
        data = value.encode(errors="surrogatepass")
    return where, io.BytesIO(data)


def _parquet(path: Path, field: str) -> Source:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(str(path), "Parquet", "pip install 'mukv[parquet]' first") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise unknown_name(f"{path}: field", field, file.schema_arrow.names)
            row = 0
            for batch in file.iter_batches(columns=[field]):
                for row, value in enumerate(batch.column(0).to_pylist(), start=row + 1):
                    yield _record(f"{path}:{row}", field, value)
    except pyarrow.ArrowException as error:
        raise BadInput(str(path), "a file that Parquet can't read", str(error)) from None


def _stdlib(name: str, field: str) -> Source:
    """The Python library's own source, without its tests."""
    if name:
        raise BadInput("SOURCE", f"stdlib:{name}", "just stdlib")
    folder = Path(sysconfig.get_path("stdlib"))
    return _python(_walk(folder, TESTS), field)


def _package(name: str, field: str) -> Source:
    """The source of an importable package or module, found without importing it."""
    top, _, inner = name.partition(".")
    try:
        spec = importlib.util.find_spec(top) if top else None
    except ValueError:
        spec = None
    if spec is None:
        known = {*sys.stdlib_module_names, *(module.name for module in pkgutil.iter_modules())}
        raise BadInput("package", name, "an importable package", nearest_name(name, known))
    if not inner and spec.origin and not spec.submodule_search_locations:
        return _python([Path(spec.origin)], field)
    for location in spec.submodule_search_locations or ():
        path = Path(location, *inner.split(".")) if inner else Path(location)
        if path.is_dir():
            return _python(_walk(path), field)
        if path.with_suffix(".py").is_file():
            return _python([path.with_suffix(".py")], field)
    raise BadInput("package", name, "a package with Python source")


def _python(paths: Iterable[Path], field: str) -> Source:
    for path in paths:
        if path.suffix == ".py":
            yield from _file(path, field)


def _hugging_face(name: str, field: str) -> Source:
    """NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; a hub data set or a folder; split `train` if none."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput("hf", name, "pip install 'mukv[huggingface]' first") from None
    path, *rest = name.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) > 1 else None
    try:
        if (Path(path) / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(path)[split]
        elif (Path(path) / "dataset_info.json").is_file():
            rows = datasets.load_from_disk(path)
        else:
            rows = datasets.load_dataset(path, config, split=split, streaming=True)
        for number, row in enumerate(rows, start=1):
            if field not in row:
                raise unknown_name(f"hf:{name}: field", field, row)
            yield _record(f"hf:{name}:{number}", field, row[field])
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput("hf", name, f"NAME, NAME:SPLIT or NAME:CONFIG:SPLIT ({error})") from error


SOURCES: dict[str, Callable[[str, str], Source]] = {
    "stdlib": _stdlib,
    "package": _package,
    "hf": _hugging_face,
}
FORMATS: dict[str, Callable[[Path, str], Source]] = {".jsonl": _jsonl, ".parquet": _parquet}
"""By suffix; all else is text."""
