"""Lock folders, so that only one process writes into a folder at a time.

A process locks the file `.lock` in the folder and writes its process number and host into it. The
operating system releases the lock when the process ends, even if it is killed. Processes that only
read take no lock.
"""

from __future__ import annotations

import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from mukv.core.errors import BadInput, telling_disk_errors

LOCK = ".lock"
RUN = "config.yaml"
"""File that marks a folder as a run directory."""


ATTEMPTS = 100
"""Number of attempts to make a folder, which other processes may remove at the same time."""


class NoLocks(OSError):
    """The file system does not support locks."""


class Held(BadInput):
    """Another process is writing to the folder."""


def run_around(path: Path) -> Path | None:
    """Return the path if it is a run directory, or else the run directory that contains it; None if
    there is none."""
    if (path / RUN).is_file():
        return path
    whole = Path(os.path.abspath(path))
    return next((parent for parent in whole.parents if (parent / RUN).is_file()), None)


@contextmanager
def writing(*folders: Path) -> Iterator[None]:
    """Hold a lock for each folder: that of the run directory which it is or which contains it, or
    else its own. See `one_writer`."""
    roots = (run_around(folder) or folder for folder in folders)
    wanted = {os.path.realpath(folder): folder for folder in roots}
    with ExitStack() as held:
        for name in sorted(wanted):
            held.enter_context(one_writer(wanted[name]))
        yield


@contextmanager
def writing_inside(path: Path) -> Iterator[None]:
    """Hold the lock of the run directory that contains a path, if there is one."""
    run = run_around(path)
    with writing(*([run] if run else [])):
        yield


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. The folder is made if necessary, and removed again if it stays
    empty.

    Raises Held, with the number of the process, if another process holds the lock. On a file system
    without locks, prints a note to standard error and takes no lock.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with telling_disk_errors(folder):
        lock = _hold(folder)
    try:
        yield
    finally:
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        release(lock)


def _hold(folder: Path) -> int | None:
    for attempt in range(ATTEMPTS):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            return acquire(folder)
        except BlockingIOError:
            given = f"a folder that {holder(folder)} is writing"
            allowed = "wait until it has ended, or choose another folder"
            raise Held(str(folder), given, allowed) from None
        except NoLocks:
            words = f"note: {folder}: no locks on this file system: let one process write here"
            print(words, file=sys.stderr)
            return None
        except FileNotFoundError:  # removed by the process that had made it
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def acquire(folder: Path) -> int:
    """Lock a folder; return the open file that holds the lock.

    Raises BlockingIOError if another process holds it, NoLocks if the file system has no locks.
    """
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            _flock(file)
            # The previous holder may have removed the file in the meantime.
            if path.exists() and os.path.samestat(os.fstat(file), os.stat(path)):
                os.ftruncate(file, 0)
                os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        os.close(file)


def _flock(file: int) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        raise NoLocks(error.errno, error.strerror) from error


def release(lock: int | None) -> None:
    """Release a lock; do nothing for None."""
    if lock is not None:
        os.close(lock)


def holder(folder: Path) -> str:
    """Name the process that holds a folder's lock, such as "process 12"."""
    for _ in range(20):
        with suppress(OSError, ValueError):
            number, host = (folder / LOCK).read_text().split()
            if host != socket.gethostname():
                return f"process {number} on {host}"
            with suppress(PermissionError):  # of another user
                os.kill(int(number), 0)
            return f"process {number}"
        time.sleep(0.05)  # it has not written its number yet
    return "another process"
