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


def require_regular_file(path: Path, where: str | None = None) -> Path:
    """`path` itself. Raises BadInput unless it ends: a FIFO or a device could be read for ever.

    where: what the error calls the path, if not by itself. Links are followed.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError as error:
        given, reason = "no such file", str(error.strerror)
    except (OSError, ValueError) as error:
        given = reason = getattr(error, "strerror", None) or "a path that no file can have"
    else:
        if stat.S_ISREG(mode):
            return path
        kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        given = reason = kinds.get(stat.S_IFMT(mode), "a device")
    if where is None:
        raise BadInput(str(path), given, "the path of a readable file is needed")
    raise BadInput(where, str(path), f"a readable file ({reason})")
