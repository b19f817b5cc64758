"""Read rows of remote sources from any row on: files on the web, Hugging Face data sets.

Each class has `after(cursor)`, which yields rows from the first one after a cursor, and `cursor()`,
the place after the latest row, as JSON. `Reliable` opens the source again there if the network
fails; `mukv.data.spool` keeps rows and cursor on disk.
"""

from __future__ import annotations

import http.client
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, runtime_checkable

from mukv.core.errors import BadInput, Failed, unknown_name

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Seconds before each further try; the count begins again after each row."""
CHUNK_BYTES = 1 << 20
"""Bytes that are read from a connection at once."""
TIMEOUT = 60.0
"""Seconds without a byte after which a connection is given up."""
ASK_AGAIN = {408, 425, 429, 500, 502, 503, 504}
"""HTTP statuses that may be others later."""
NETWORK = {"aiohttp", "httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
"""Packages whose exceptions are failures of the network."""


class Row(NamedTuple):
    """The value of a record's text field. name: place of the record, for messages."""

    name: str
    value: object


@runtime_checkable
class RemoteRows(Protocol):
    """Rows of a source, which can be read from any row on."""

    @property
    def name(self) -> str: ...

    def after(self, cursor: Any) -> Iterator[Row]: ...

    def cursor(self) -> Any: ...


class Reliable:
    """Iterate over the rows after a cursor (None: all); open them again where the network fails.

    Raises Failed if every further try fails, and what the source raises for other reasons.
    """

    def __init__(self, rows: RemoteRows, cursor: Any = None):
        self.rows, self.opened_at, self.moved = rows, cursor, False

    def __iter__(self) -> Iterator[Row]:
        failures = 0
        while True:
            self.moved = False
            try:
                for row in self.rows.after(self.opened_at):
                    self.moved, failures = True, 0
                    yield row
                return
            except Exception as error:
                if not passes(error):
                    raise
                if failures == len(PAUSES):
                    reason = str(error) or type(error).__name__
                    raise Failed(
                        f"{self.rows.name}: {reason}, after {failures + 1} tries; "
                        "the same command goes on from there"
                    ) from error
                self.opened_at = self.cursor()
                time.sleep(PAUSES[failures])
                failures += 1

    def cursor(self) -> Any:
        """Return the place after the latest row."""
        return self.rows.cursor() if self.moved else self.opened_at


def passes(error: BaseException) -> bool:
    """Whether an error is one of the network, so that another try may succeed."""
    response = getattr(error, "response", None)
    status = getattr(error, "code", None) or getattr(response, "status_code", None)
    if isinstance(status, int):
        return status in ASK_AGAIN
    if isinstance(error, urllib.error.URLError):
        return not isinstance(error.reason, str)  # a text: an unknown kind of address
    if type(error).__module__.partition(".")[0] in NETWORK:
        return True
    return isinstance(error, (ConnectionError, TimeoutError, http.client.HTTPException))


@dataclass
class Address:
    """A file on the web, which can be read from any byte on.

    stamp: what identifies the content: the ETag or time of change when it was first opened
    size: bytes, known when it is opened; None if the server does not send it
    """

    url: str
    stamp: str | None = None
    size: int | None = None

    def chunks(self, start: int, end: int | None = None) -> Iterator[bytes]:
        """Yield the bytes from `start` to `end` (excluded; None: to the last), in parts.

        Raises BadInput for an address without content, and for one whose content has changed;
        ConnectionError where the connection ends too early.
        """
        if self.size is not None and start >= min(self.size, self.size if end is None else end):
            return
        with self._open(start, end) as response:
            until = self.size if end is None else end
            place = start if response.status == 206 else 0  # 200: the server sends all of it
            while until is None or place < until:
                part = response.read(
                    CHUNK_BYTES if until is None else min(CHUNK_BYTES, until - place)
                )
                if not part:
                    break
                place += len(part)
                if place > start:
                    yield part[max(0, len(part) - (place - start)) :]
            if until is not None and place < until:
                raise ConnectionError(f"the connection ended after {place:,} of {until:,} bytes")

    def _open(self, start: int, end: int | None) -> http.client.HTTPResponse:
        last = "" if end is None else end - 1
        request = urllib.request.Request(self.url, headers={"Range": f"bytes={start}-{last}"})
        try:
            response = urllib.request.urlopen(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            if error.code in ASK_AGAIN:
                raise
            allowed = "the address of a file that can be read"
            raise BadInput(self.url, f"HTTP status {error.code}", allowed) from None
        stamp = response.headers.get("ETag") or response.headers.get("Last-Modified")
        if self.stamp not in (None, stamp):
            response.close()
            raise BadInput(self.url, "a changed file", f"the one that was begun ({self.stamp})")
        self.stamp = stamp
        given = response.headers.get("Content-Range", "").rpartition("/")[2]
        total = given if response.status == 206 else response.headers.get("Content-Length", "")
        self.size = int(total) if total.isdecimal() else self.size
        return response


class Lines:
    """The records of a JSONL file on the web."""

    def __init__(self, url: str, field: str):
        self.name, self.field = url, field
        self.address = Address(url)
        self.offset = self.number = 0

    def after(self, cursor: Any) -> Iterator[Row]:
        if cursor is not None:
            self.offset, self.number = cursor["offset"], cursor["number"]
            self.address = Address(self.name, cursor["stamp"], cursor["size"])
        else:
            self.offset = self.number = 0
        for line in self._lines(self.offset):
            where = f"{self.name}:{self.number + 1}"
            value = json_field(line, self.field, where) if line.strip() else None
            self.offset += len(line)
            self.number += 1
            yield Row(where, value)

    def _lines(self, start: int) -> Iterator[bytes]:
        rest = b""
        for part in self.address.chunks(start):
            *lines, rest = (rest + part).split(b"\n")
            yield from (line + b"\n" for line in lines)
        if rest:
            yield rest

    def cursor(self) -> Any:
        place = {"offset": self.offset, "number": self.number}
        return place | {"stamp": self.address.stamp, "size": self.address.size}


class Table:
    """The rows of a Parquet file on the web, of which only the text's column is fetched."""

    def __init__(self, url: str, field: str):
        self.name, self.field = url, field
        self.address = Address(url)
        self.group = self.row = 0

    def after(self, cursor: Any) -> Iterator[Row]:
        pyarrow = require_pyarrow(self.name)
        begin = cursor or {"group": 0, "row": 0, "stamp": None, "size": None}
        self.address = Address(self.name, begin["stamp"], begin["size"])
        if self.address.size is None:
            next(self.address.chunks(0, 1), None)
        if self.address.size is None:
            raise BadInput(self.name, "a server that does not tell sizes", "one that does")
        try:
            with pyarrow.parquet.ParquetFile(Ranges(self.address)) as file:
                if self.field not in file.schema_arrow.names:
                    raise unknown_name(f"{self.name}: field", self.field, file.schema_arrow.names)
                for group in range(begin["group"], file.num_row_groups):
                    values = file.read_row_group(group, columns=[self.field]).column(0)
                    first = begin["row"] if group == begin["group"] else 0
                    for row in range(first, len(values)):
                        self.group, self.row = group, row
                        yield Row(f"{self.name}: group {group}, row {row}", values[row].as_py())
        except pyarrow.ArrowException as error:
            raise BadInput(self.name, "a file that Parquet can't read", str(error)) from None

    def cursor(self) -> Any:
        place = {"group": self.group, "row": self.row + 1}
        return place | {"stamp": self.address.stamp, "size": self.address.size}


class Ranges(io.RawIOBase):
    """A remote file that can be sought, as pyarrow needs it; each read is a request."""

    def __init__(self, address: Address):
        self.address, self.place = address, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = (0, self.place, self.address.size or 0)[whence]
        self.place = start + offset
        return self.place

    def read(self, size: int = -1) -> bytes:
        total = self.address.size or 0
        end = total if size is None or size < 0 else min(total, self.place + size)
        data = b"".join(self.address.chunks(self.place, end)) if end > self.place else b""
        self.place += len(data)
        return data


class Hub:
    """The rows of a data set of the Hugging Face hub, as a stream of the library `datasets`.

    name: NAME, NAME:SPLIT or NAME:CONFIG:SPLIT; SPLIT is `train` if none is given
    """

    def __init__(self, name: str, field: str):
        self.name, self.field = f"hf:{name}", field
        self.parts, self.number = name, 0
        self.rows: Any = None
        self.datasets = require_datasets(name)

    def after(self, cursor: Any) -> Iterator[Row]:
        path, *rest = self.parts.split(":")
        config = rest[0] if len(rest) > 1 else None
        split = rest[-1] if rest else "train"
        try:
            self.rows = self.datasets.load_dataset(path, config, split=split, streaming=True)
            self.number = 0
            if cursor is not None:
                self.number = cursor["number"]
                self.rows.load_state_dict(cursor["state"])
            for row in self.rows:
                self.number += 1
                if self.field not in row:
                    raise unknown_name(f"{self.name}: field", self.field, row)
                yield Row(f"{self.name}:{self.number}", row[self.field])
        except (OSError, ValueError, LookupError, self.datasets.exceptions.DatasetsError) as error:
            if isinstance(error, BadInput) or passes(error):
                raise
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            allowed = f"NAME, NAME:SPLIT or NAME:CONFIG:SPLIT ({reason})"
            raise BadInput("hf", self.parts, allowed) from error

    def cursor(self) -> Any:
        return {"number": self.number, "state": self.rows.state_dict()}


def require_datasets(name: str) -> Any:
    """Import `datasets`. Raises BadInput that names the extra to install."""
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise BadInput("hf", name, "pip install 'mukv[huggingface]' first") from None
    return datasets


def require_pyarrow(name: str) -> Any:
    """Import pyarrow with its reader of Parquet. Raises BadInput that names the extra."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BadInput(name, "Parquet", "pip install 'mukv[parquet]' first") from None
    return pyarrow


def json_field(line: bytes, field: str, where: str) -> object:
    """Return a field of a line with a JSON object. Bytes that are not UTF-8 are kept as surrogates.
    Raises BadInput."""
    try:
        record = json.loads(line.decode(errors="surrogateescape"))
    except (ValueError, RecursionError) as error:
        raise BadInput(where, _start(line), f"one JSON object per line ({error})") from None
    if not isinstance(record, dict):
        raise BadInput(where, _start(line), "one JSON object per line")
    if field not in record:
        raise unknown_name(f"{where}: field", field, map(str, record))
    return record[field]


def _start(line: bytes) -> str:
    return line[:40].decode(errors="replace").strip()
