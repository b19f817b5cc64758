"""Read and write objects of a folder in an object store: s3:// (S3 and compatible), gs://.

An object is written whole or not at all, and a listing shows every object whose writing has ended:
S3 (since December 2020) and Google Cloud Storage both guarantee this. Neither renames, and neither
writes several objects in one step; but both write an object only if none of its name exists
(`If-None-Match: *`, `ifGenerationMatch=0`), which `create` uses. Credentials are those that s3fs
and gcsfs find in the environment or in their files. Errors have the address and a reason in words
of our own, because messages of the libraries may repeat credentials.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput, Failed

EXTRAS: Mapping[str, str] = {"s3": "s3fs", "gs": "gcsfs"}
"""Package of each kind of address. The name of the extra is that of the kind."""
ADDRESS = re.compile(r"(?P<kind>s3|gs):/{1,2}(?P<place>.*)", re.DOTALL)
"""pathlib makes one slash of two."""
PLACE = re.compile(r"[a-z0-9][a-z0-9._-]+(/[^/?#\x00]+)+/?")
MISSING_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "DefaultCredentialsError")
IN_THE_WAY = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")


def address(path: str | Path) -> str | None:
    """Return an address of an object store as it was typed, without a slash at its end; None for
    another path. Raises BadInput for an address without a bucket and a folder, and for one with
    credentials in it, which is not repeated."""
    found = ADDRESS.fullmatch(str(path))
    if found is None:
        return None
    kind, place = found["kind"], found["place"]
    if "@" in place.partition("/")[0]:
        allowed = f"{kind}://BUCKET/FOLDER: credentials belong into the environment"
        raise BadInput(f"{kind}://", "an address with credentials in it", allowed)
    if not PLACE.fullmatch(place):
        raise BadInput(f"{kind}://", f"{kind}://{place}", f"{kind}://BUCKET/FOLDER")
    return f"{kind}://{place.rstrip('/')}"


class Objects:
    """The objects below an address; their names are relative to it, with slashes."""

    def __init__(self, url: str):
        """url: from `address`. Raises BadInput if the package for its kind is missing."""
        self.url = url
        kind, _, self.root = url.partition("://")
        try:
            import fsspec

            self.files: Any = fsspec.filesystem(
                kind, use_listings_cache=False, skip_instance_cache=True
            )
        except ImportError as error:
            allowed = f"needs {EXTRAS[kind]}: pip install 'mukv[{kind}]'"
            raise BadInput(url, "an address of an object store", allowed) from error
        except Exception as error:  # credentials are looked for
            raise _told(error, url) from None

    def list(self) -> dict[str, str]:
        """Return the names of all objects, with what identifies the content of each."""
        with self._telling():
            try:
                found = self.files.find(self.root, detail=True)
            except FileNotFoundError:  # no such bucket, or nothing below the address
                self.files.ls(self.root.partition("/")[0])
                return {}
        start = len(self.root) + 1
        return {
            name[start:]: _stamp(facts)
            for name, facts in sorted(found.items())
            if name.startswith(f"{self.root}/") and facts.get("type") != "directory"
        }

    def read(self, name: str) -> bytes | None:
        """Return the content of an object; None if there is none of this name."""
        with self._telling():
            try:
                return self.files.cat_file(self._path(name))
            except FileNotFoundError:
                return None

    def fetch(self, name: str, path: Path) -> None:
        """Copy an object to a file."""
        with self._telling():
            self.files.get_file(self._path(name), str(path))

    def send(self, path: Path, name: str) -> None:
        """Copy a file to an object. Raises FileNotFoundError if the file was removed."""
        if not path.is_file():
            raise FileNotFoundError(path)
        with self._telling():
            self.files.put_file(str(path), self._path(name))

    def write(self, name: str, content: bytes) -> None:
        """Write or replace an object."""
        with self._telling():
            self.files.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Write an object unless one of this name exists; return whether it was written."""
        with self._telling():
            try:
                self.files.pipe_file(self._path(name), content, mode="create")
            except Exception as error:
                if isinstance(error, FileExistsError) or _code(error) in IN_THE_WAY:
                    return False
                raise
        return True

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects, in this order. One that does not exist is no error."""
        for name in names:
            with self._telling():
                try:
                    self.files.rm_file(self._path(name))
                except FileNotFoundError:
                    continue

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    @contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except (BadInput, Failed):
            raise
        except Exception as error:  # each library has its own
            raise _told(error, self.url) from None


def _stamp(facts: Mapping[str, Any]) -> str:
    """Return what identifies the content of an object in a listing."""
    keys = ("ETag", "etag", "md5Hash", "generation", "LastModified", "updated")
    return str(next((facts[key] for key in keys if facts.get(key)), facts.get("size")))


def _code(error: BaseException) -> str | None:
    """Return the code with which a store refused, such as "AccessDenied"; None if it has none."""
    cause: BaseException | None = error
    while cause is not None:
        response = getattr(cause, "response", None)
        code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
        code = code or getattr(cause, "code", None)
        if isinstance(code, str | int) and re.fullmatch(r"\w{1,40}", str(code)):
            return str(code)
        cause = cause.__cause__
    return None


def _told(error: Exception, url: str) -> BadInput | Failed:
    """Return the error for a user, without the text of the library's error, which may have keys,
    signatures or tokens in it."""
    code = _code(error)
    told = f" ({code})" if code else ""
    if type(error).__name__ in MISSING_CREDENTIALS:
        allowed = "credentials in the environment or in the files of aws or gcloud"
        return BadInput(url, "no credentials", allowed)
    if isinstance(error, PermissionError):
        allowed = "credentials that may list, read, write and delete there"
        return BadInput(url, f"access refused{told}", allowed)
    if isinstance(error, FileNotFoundError):
        return BadInput(url, f"no such bucket or object{told}", "an existing bucket")
    kind = type(error).__name__
    return Failed(f"{url}: the object store can't be used: {kind}{told}; the same command goes on")
