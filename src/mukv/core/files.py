"""Files that are whole or not there: written under a temporary name, then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mukv.core.errors import BadInput, Failed


@contextmanager
def telling_disk_errors(path: Path) -> Iterator[None]:
    """Turn what the file system refuses into one clear line about `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise Failed(f"{path}: the disk is full; nothing was left half-written") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
            raise BadInput(str(path), "a folder that can't be written", "choose another") from error
        if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY, errno.EISDIR):
            raise BadInput(str(path), "something in the way", "choose another path") from error
        raise


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, durably."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with telling_disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary sibling that becomes `path` when the block ends well, and vanishes otherwise.

    What was at `path` before is replaced.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with telling_disk_errors(path):
        temporary.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            if path.exists():
                old = path.with_name(f".{path.name}.{os.getpid()}.old")
                os.replace(path, old)
                os.replace(temporary, path)
                shutil.rmtree(old)
            else:
                os.replace(temporary, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def require_regular_file(path: Path) -> Path:
    """The path, where a regular file lies there, links followed. Raises BadInput for nothing, and
    for a folder, a pipe or a device, which a reader would wait for or never come to the end of."""
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a name that no file system has
        missing = isinstance(error, FileNotFoundError | NotADirectoryError)
        given = "no such file" if missing else f"a path that can't be read ({error})"
        raise BadInput(str(path), given, "a regular file") from None
    if not stat.S_ISREG(mode):
        raise BadInput(str(path), "no regular file", "a file, no folder, pipe or device")
    return path


def file_inside(folder: Path, name: str) -> Path:
    """The regular file of this name in a folder that others made. Raises BadInput for a name or a
    link that leaves the folder; links into the blobs of the hub's cache, which its snapshots
    consist of, stay in it."""
    path = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadInput(str(folder), name, "the name of a file inside this folder")
    require_regular_file(path)
    root, real = folder.resolve(), path.resolve()
    blobs = [place.parent / "blobs" for place in (root, *root.parents) if place.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in (root, *blobs)):
        raise BadInput(str(path), f"a link to {real}", "a file inside this folder")
    return path
