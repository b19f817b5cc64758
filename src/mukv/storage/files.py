"""Files that are whole or not there: written in a temporary folder, then renamed.

The folder, `.NAME.PROCESS.partial`, lies beside what is written, and its process holds its lock.
Those that nobody holds are what killed processes have left: the next process that writes beside
them removes them.
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
"""Names that are tried for a temporary folder."""
OLD = ".old"
"""In a temporary folder, where two folders can't be exchanged at once: what is being replaced."""
AT_WORKING_FOLDER, EXCHANGE = -100, 2
"""Of Linux's renameat2: AT_FDCWD and RENAME_EXCHANGE."""


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace a file in one step, durably."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write a file to, which becomes `path` in one step when the block ends well."""
    with telling_disk_errors(path), temporary(path) as made:
        yield made
        with made.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(made, path)


@contextmanager
def new_folder(path: Path, overwrite: bool = False) -> Iterator[Path]:
    """A new folder that becomes `path` when the block ends well, and vanishes otherwise.

    overwrite: a folder that is there by then is replaced, so that at every moment one of the two
    is there; else it stays, and BadInput is raised unless its files are the same.
    """
    with telling_disk_errors(path), temporary(path) as made:
        made.mkdir()
        yield made
        if overwrite and path.is_dir():
            _replace_folder(made, path)
        elif not _same(made, path):
            os.rename(made, os.path.abspath(path))  # onto nothing, or onto an empty folder


@contextmanager
def temporary(path: Path) -> Iterator[Path]:
    """A path of the same name in a temporary folder of its own beside `path`.

    The folder is removed in the end, and those that killed processes have left there at once.
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
    """Remove the temporary folders in a folder whose processes are gone; what can't be removed,
    or can't be told from that of a living process, stays."""
    with suppress(OSError):
        for entry in list(os.scandir(parent)):
            match = PARTIAL.fullmatch(entry.name)
            if match and entry.is_dir(follow_symlinks=False):
                with suppress(OSError):  # one that is held does not keep the others
                    _clear(Path(entry.path), parent / match["name"])


def writer_of(path: Path) -> str | None:
    """The living process that makes `path` in a temporary folder, such as "process 12"."""
    with suppress(OSError):
        for entry in os.scandir(Path(os.path.abspath(path)).parent):
            match = PARTIAL.fullmatch(entry.name)
            if match and match["name"] == os.path.basename(os.path.abspath(path)):
                try:
                    _clear(Path(entry.path), path)
                except BlockingIOError:
                    return holder(Path(entry.path))
    return None


def is_leftover(path: Path) -> bool:
    """Whether this is a temporary folder, or a lock."""
    return path.name == LOCK or PARTIAL.fullmatch(path.name) is not None


def _private(path: Path) -> tuple[Path, int | None]:
    """A new folder beside a path, and the lock on it."""
    for number in count():
        last = number > MOST_TRIES
        again = f"-{number}" if number else ""
        folder = path.with_name(f".{path.name}.{os.getpid()}{again}.partial")
        try:
            folder.mkdir()
            return folder, acquire(folder)
        except (FileExistsError, FileNotFoundError, BlockingIOError):
            # Of another thread; or who clears leftovers was quicker than this lock.
            if last or not path.parent.is_dir():
                raise  # also where nothing can be made, as in /proc
        except NoLocks:
            return folder, None
    raise AssertionError


def _clear(folder: Path, target: Path) -> None:
    """Raises BlockingIOError if a process holds the folder."""
    names = os.listdir(folder)
    if names and LOCK not in names:
        return  # not one of ours
    try:
        lock = acquire(folder)
    except NoLocks:
        return
    try:
        _remove(folder, target)
    finally:
        release(lock)


def _remove(folder: Path, target: Path) -> None:
    """Remove a temporary folder that is locked, the lock last: without it nobody would know
    what the folder is."""
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
    """Whether two folders have files of the same names and content, locks aside."""
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
        # A kill between these two is mended by whoever next looks for leftovers.
        os.rename(path, new.parent / OLD)
        os.rename(new, path)


def _exchange(one: Path, two: Path) -> None:
    """Let two paths change places in one step. Raises OSError where the system can't."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, "no renameat2")
    paths = AT_WORKING_FOLDER, os.fsencode(one), AT_WORKING_FOLDER, os.fsencode(two)
    if rename(*paths, EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), str(two))


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


def cache_folder() -> Path:
    """Where compiled programs and the default corpus are kept: $MUKV_CACHE or the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get("MUKV_CACHE") or Path(base) / "mukv")
