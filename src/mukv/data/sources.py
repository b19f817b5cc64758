"""Sources of text: files, folders, Python packages, data sets.

A source is a string: a path, or `kind:name` with a kind of the table `SOURCES`. A source function
yields documents as open binary files, or returns `RemoteRows`. To add a source, write a function
and add a line to the table. The order of documents is deterministic: paths are sorted, and rows
keep their order.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pkgutil
import sys
import sysconfig
import urllib.parse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from mukv.core.errors import BadInput, nearest_name, unknown_name
from mukv.core.table import imported
from mukv.data.remote import (
    Hub,
    Lines,
    Reliable,
    RemoteRows,
    Row,
    Table,
    json_field,
    require_datasets,
    require_pyarrow,
)
from mukv.data.spool import spooled
from mukv.storage.files import require_regular_file

TESTS = frozenset({"test", "tests", "idle_test", "site-packages", "dist-packages"})
"""Folders that are left out of the standard library."""
SAVED_DATA_SET = ("dataset_dict.json", "dataset_info.json")
NamedFiles = Iterator[tuple[str, BinaryIO]]
"""Names (for messages) and open files of documents."""


class Messages(str):
    """Name of a field with the messages of a conversation, which is read as JSON."""


def open_source(source: str, field: str, spools: Path | None = None) -> NamedFiles:
    """Open the documents of a source. Of records, the text in `field` is read.

    spools: folder in which what a remote source sent is kept; None keeps nothing

    Raises BadInput at once for an unknown name, and during iteration for a document that can't be
    read.
    """
    kind, _, name = source.partition(":")
    if kind in SOURCES:
        found = SOURCES[kind](name, field)
        return _streamed(found, field, spools) if isinstance(found, RemoteRows) else found
    if name and "." in kind and not os.path.lexists(source):
        return imported(kind, "SOURCE")(name, field)
    return _path(source, field)


@contextmanager
def telling_read_errors(name: str) -> Iterator[None]:
    """Turn the file system's errors while reading into one BadInput about `name`."""
    try:
        yield
    except OSError as error:
        raise BadInput(name, error.strerror or str(error), "a readable text") from error


def nearest_path(path: Path) -> str | None:
    """Return the path in the same folder that is most similar to a missing path, or None."""
    try:
        return nearest_name(str(path), (str(each) for each in path.parent.iterdir()))
    except OSError:
        return None


def _path(source: str, field: str) -> NamedFiles:
    """Open a file by its suffix, or all files of a folder except hidden and binary ones."""
    path = Path(source)
    if not path.exists():
        near = nearest_name(source, SOURCES) or nearest_path(path)
        allowed = "a file or folder, stdlib, package:NAME, hf:NAME or an address (https://...)"
        raise BadInput("SOURCE", source, allowed, near)
    if not path.is_dir():
        return _file(path, field)
    if any((path / name).is_file() for name in SAVED_DATA_SET):
        return _hugging_face(source, field)
    return _folder(path, field)


def _folder(path: Path, field: str) -> NamedFiles:
    for file in _walk(path):
        if file.suffix in FORMATS or not _binary(file):
            yield from _file(file, field)


def binary_files(source: str) -> int:
    """Count the files of a folder that are left out because they are binary; 0 for
    other sources.
    """
    path = Path(source)
    if source.partition(":")[0] in SOURCES or not path.is_dir():
        return 0
    if any((path / name).is_file() for name in SAVED_DATA_SET):
        return 0
    return sum(file.suffix not in FORMATS and _binary(file) for file in _walk(path))


def _file(path: Path, field: str) -> NamedFiles:
    require_regular_file(path)
    with telling_read_errors(str(path)):
        yield from FORMATS.get(path.suffix, _text)(path, field)


def _walk(folder: Path, leave_out: frozenset[str] = frozenset()) -> Iterator[Path]:
    """Yield regular files in sorted order, without hidden ones and __pycache__."""

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
    """Whether there is a NUL in the file's first 8 KiB, git's rule for binary files."""
    with telling_read_errors(str(path)), path.open("rb") as file:
        return b"\0" in file.read(8192)


def _text(path: Path, field: str) -> NamedFiles:
    with path.open("rb") as file:
        yield str(path), file


def _jsonl(path: Path, field: str) -> NamedFiles:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            yield record(where, field, json_field(line, field, where))


def record(where: str, field: str, value: object) -> tuple[str, BinaryIO]:
    """Return the name and the content of a record's text. Raises BadInput unless it is text."""
    if value is None:
        return where, io.BytesIO()
    if isinstance(field, Messages):
        value = spelled_messages(where, field, value)
    if not isinstance(value, str):
        raise BadInput(f"{where}: {field}", value, "text")
    try:
        data = value.encode(errors="surrogateescape")
    except UnicodeEncodeError:  # a lone surrogate that JSON spelt out: \ud800
        data = value.encode(errors="surrogatepass")
    return where, io.BytesIO(data)


def spelled_messages(where: str, field: str, value: object) -> str:
    """Return messages as JSON. Raises BadInput for anything but a list of mappings."""
    if isinstance(value, str):  # of a spool, or a field that has JSON
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        allowed = "a list of mappings with `role` and `content`"
        raise BadInput(f"{where}: {field}", value, allowed)
    return json.dumps(value)


def _parquet(path: Path, field: str) -> NamedFiles:
    pyarrow = require_pyarrow(str(path))
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            if field not in file.schema_arrow.names:
                raise unknown_name(f"{path}: field", field, file.schema_arrow.names)
            batches = file.iter_batches(columns=[field])
            values = (value for batch in batches for value in batch.column(0).to_pylist())
            for number, value in enumerate(values, start=1):
                yield record(f"{path}:{number}", field, value)
    except pyarrow.ArrowException as error:
        raise BadInput(str(path), "a file that Parquet can't read", str(error)) from None


def _stdlib(name: str, field: str) -> NamedFiles:
    """Open the Python library's own source, without its tests."""
    if name:
        raise BadInput("SOURCE", f"stdlib:{name}", "`stdlib` takes no name")
    folder = Path(sysconfig.get_path("stdlib"))
    return _python(_walk(folder, TESTS), field)


def _package(name: str, field: str) -> NamedFiles:
    """Open the source of an importable package or module, found without importing it."""
    top, _, inner = name.partition(".")
    try:
        spec = importlib.util.find_spec(top) if top else None
    except ValueError:
        spec = None
    if spec is None:
        known = {*sys.stdlib_module_names, *(module.name for module in pkgutil.iter_modules())}
        raise BadInput("package", name, "an importable package", nearest_name(name, known))
    if not inner and str(spec.origin).endswith(".py") and not spec.submodule_search_locations:
        return _python([Path(str(spec.origin))], field)
    for location in spec.submodule_search_locations or ():
        path = Path(location, *inner.split(".")) if inner else Path(location)
        if path.is_dir():
            return _python(_walk(path), field)
        if path.with_suffix(".py").is_file():
            return _python([path.with_suffix(".py")], field)
    raise BadInput("package", name, "a package with Python source")


def _python(paths: Iterable[Path], field: str) -> NamedFiles:
    for path in paths:
        if path.suffix == ".py":
            yield from _file(path, field)


def _hugging_face(name: str, field: str) -> NamedFiles:
    """Open a data set in a folder that `datasets` has saved: FOLDER or FOLDER:SPLIT."""
    datasets = require_datasets(name)
    path, *rest = name.split(":")
    try:
        rows = datasets.load_from_disk(path)
        if isinstance(rows, datasets.DatasetDict):
            rows = rows[rest[-1] if rest else "train"]
        elif rest:
            raise BadInput("hf", name, f"{path} alone: a saved data set without splits")
        for number, row in enumerate(rows, start=1):
            if field not in row:
                raise unknown_name(f"hf:{name}: field", field, row)
            yield record(f"hf:{name}:{number}", field, row[field])
    except BadInput:
        raise
    except (OSError, ValueError, LookupError, datasets.exceptions.DatasetsError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadInput(
            "hf", name, f"a saved data set: FOLDER or FOLDER:SPLIT ({reason})"
        ) from error


def _hub(name: str, field: str) -> NamedFiles | RemoteRows:
    """Open a data set in a folder, or stream one of the hub."""
    folder = Path(name.partition(":")[0])
    if any((folder / saved).is_file() for saved in SAVED_DATA_SET):
        return _hugging_face(name, field)
    return Hub(name, field)


def _web(kind: str) -> Callable[[str, str], RemoteRows]:
    """Return the reader of files on the web, by the suffix in their address."""

    def read(name: str, field: str) -> RemoteRows:
        url = f"{kind}:{name}"
        suffix = PurePosixPath(urllib.parse.urlsplit(url).path).suffix
        if suffix not in WEB:
            allowed = f"the address of a file that ends in {' or '.join(WEB)}"
            raise BadInput("SOURCE", url, allowed)
        return WEB[suffix](url, field)

    return read


def _streamed(rows: RemoteRows, field: str, spools: Path | None) -> NamedFiles:
    """Yield the documents of a remote source; with `spools`, those kept there are not fetched."""
    if isinstance(field, Messages):
        rows = _SpelledRows(rows, field)
    for row in Reliable(rows) if spools is None else spooled(rows, field, spools):
        yield record(row.name, field, row.value)


class _SpelledRows:
    """Remote rows whose values are messages, as JSON."""

    def __init__(self, rows: RemoteRows, field: Messages):
        self.rows, self.field, self.name = rows, field, rows.name

    def after(self, cursor: Any) -> Iterator[Row]:
        for row in self.rows.after(cursor):
            value = row.value
            if value is not None:
                value = spelled_messages(row.name, self.field, value)
            yield Row(row.name, value)

    def cursor(self) -> Any:
        return self.rows.cursor()


SOURCES: dict[str, Callable[[str, str], NamedFiles | RemoteRows]] = {
    "stdlib": _stdlib,
    "package": _package,
    "hf": _hub,
    "http": _web("http"),
    "https": _web("https"),
}
FORMATS: dict[str, Callable[[Path, str], NamedFiles]] = {".jsonl": _jsonl, ".parquet": _parquet}
"""Readers by suffix; all other files are read as text."""
WEB: dict[str, Callable[[str, str], RemoteRows]] = {".jsonl": Lines, ".parquet": Table}
"""Readers of files on the web by suffix."""
