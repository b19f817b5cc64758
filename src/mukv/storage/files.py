"""Write files and folders atomically: into a temporary folder, and then by a rename.

The temporary folder, `.NAME.PROCESS.partial`, is made beside the target and locked by its process.
A temporary folder without a lock was left by a killed process; the next process that writes beside
it removes it.
"""

from __future__ import annotations

import ctypes
import errno
import filecmp
import os
import re
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from mukv.core.errors import BadInput, telling_disk_errors
from mukv.storage.locks import LOCK, NoLocks, acquire, holder, release

PARTIAL = re.compile(r"\.(?P<name>.+)\.\d+(-\d+)?\.partial", re.DOTALL)
MOST_TRIES = 99
"""Number of names that are tried for a temporary folder."""
OLD = ".old"
"""Name of a replaced folder inside a temporary folder, on systems that can't exchange two folders
in one step.
"""
AT_WORKING_FOLDER, EXCHANGE = -100, 2
"""Arguments of Linux's renameat2: AT_FDCWD and RENAME_EXCHANGE."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write or replace a file in one step, and flush it to disk."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to; it replaces `path` in one step if the block succeeds."""
    with telling_disk_errors(path), temporary(path) as made:
        yield made
        with made.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(made, path)


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a new folder that becomes `path` if the block succeeds and is removed otherwise.

    overwrite: whether an existing folder is replaced, so that one of the two exists at every
        moment; if false, BadInput is raised unless the existing folder has the same files
    """
    with telling_disk_errors(path), temporary(path) as made:
        made.mkdir()
        yield made
        if overwrite and path.is_dir():
            _replace_folder(made, path)
        elif not _same(made, path):
            os.rename(made, os.path.abspath(path))  # `path` is missing or an empty folder


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """Yield a path of the same name in a new temporary folder beside `path`.

    The temporary folder is removed at the end. Temporary folders that killed processes have left
    beside `path` are removed at the beginning.
    """
    path = Path(os.path.abspath(path))  # "." has no name
    path.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(path.parent)
    folder, lock = _private(path)
    try:
        yield folder / path.name
    finally:
        _remove(folder, path)
        release(lock)


def clear_leftovers(parent: Path) -> None:
    """Remove the temporary folders of ended processes from a folder. Those that can't be removed,
    or may belong to a running process, are kept.
    """
    with suppress(OSError):
        with os.scandir(parent) as entries:
            found = list(entries)
        for entry in found:
            match = PARTIAL.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):  # continue with the others
                    _clear(Path(entry.path), parent / match["name"])


def writer_of(path: Path) -> str | None:
    """Return the name of the running process that is writing `path`, such as "process 12"; None if
    there is none.
    """
    whole = Path(os.path.abspath(path))
    with suppress(OSError), os.scandir(whole.parent) as entries:
        for entry in entries:
            match = PARTIAL.fullmatch(entry.name)
            if match and match["name"] == whole.name:
                try:
                    _clear(Path(entry.path), path)
                except BlockingIOError:
                    return holder(Path(entry.path))
    return None


def is_leftover(path: Path) -> bool:
    """Whether a path is a temporary folder or a lock file."""
    return path.name == LOCK or PARTIAL.fullmatch(path.name) is not None


def _private(path: Path) -> tuple[Path, int | None]:
    """Make a new folder beside a path; return it and the lock on it (None without locks)."""
    for number in count():
        last = number > MOST_TRIES
        again = f"-{number}" if number else ""
        folder = path.with_name(f".{path.name}.{os.getpid()}{again}.partial")
        try:
            folder.mkdir()
            return folder, acquire(folder)
        except (FileExistsError, FileNotFoundError, BlockingIOError):
            # Another thread has made it, or another process removed it before it was locked.
            if last or not path.parent.is_dir():
                raise  # also where folders can't be made, as in /proc
        except NoLocks:
            return folder, None
    raise AssertionError


def _clear(folder: Path, target: Path) -> None:
    """Remove the temporary folder of an ended process. Raises BlockingIOError if a process holds
    it.
    """
    names = os.listdir(folder)
    if names and LOCK not in names:
        return  # not made by mukv
    try:
        lock = acquire(folder)
    except NoLocks:
        return
    try:
        _remove(folder, target)
    finally:
        release(lock)


def _remove(folder: Path, target: Path) -> None:
    """Remove a locked temporary folder, its lock file last, because the lock file identifies it."""
    with suppress(OSError):
        if (folder / OLD).exists() and not target.exists():
            os.rename(folder / OLD, target)
        for name in os.listdir(folder):
            if name != LOCK:
                _delete(folder / name)
    with suppress(OSError):
        (folder / LOCK).unlink(missing_ok=True)
        folder.rmdir()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _same(one: Path, two: Path) -> bool:
    """Whether two folders have files of the same names and contents, apart from lock files."""
    names, others = (
        sorted(
            path.relative_to(folder)
            for path in folder.rglob("*")
            if path.is_file() and path.name != LOCK
        )
        for folder in (one, two)
    )
    return (
        two.is_dir()
        and names == others
        and all(filecmp.cmp(one / name, two / name, shallow=False) for name in names)
    )


def _replace_folder(new: Path, path: Path) -> None:
    try:
        _exchange(new, path)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
            raise
        # After a kill between these two, the next call of `clear_leftovers` restores the old
        # folder.
        os.rename(path, new.parent / OLD)
        os.rename(new, path)


def _exchange(one: Path, two: Path) -> None:
    """Exchange two paths in one step. Raises OSError where the system can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, "no renameat2")
    paths = AT_WORKING_FOLDER, os.fsencode(one), AT_WORKING_FOLDER, os.fsencode(two)
    if rename(*paths, EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(two))


def require_regular_file(path: Path, where: str | None = None) -> Path:
    """Return `path`. Raises BadInput unless it is a regular file: a FIFO or a device may never end.

    where: name of the path in the error; None means the path itself

    Links are followed.
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


def file_inside(folder: Path, name: str) -> Path:
    """Return the regular file of this name in a folder from elsewhere.

    Raises BadInput for a name or a link that leaves the folder. Links into the blobs of the Hugging
    Face cache, of which its snapshots consist, are allowed.
    """
    path = folder / name
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise BadInput(str(folder), name, "the name of a file inside this folder")
    require_regular_file(path)
    root, real = folder.resolve(), path.resolve()
    blobs = [place.parent / "blobs" for place in (root, *root.parents) if place.name == "snapshots"]
    if not any(real.is_relative_to(place) for place in (root, *blobs)):
        raise BadInput(str(path), f"a link to {real}", "a file inside this folder")
    return path


def cache_folder() -> Path:
    """Return the folder of cached files, such as compiled programs and the default corpus: the
    variable MUKV_CACHE, or a folder in the user's cache.
    """
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("MUKV_CACHE") or Path(base) / "mukv")
