"""A folder has one writer: whoever holds the lock on the file `.lock` in it.

The system releases a lock when its process ends, however it ends; the file says which process it
is. Processes that only read take no lock.
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
"""The file that makes a folder a run directory."""


ATTEMPTS = 100
"""To make a folder that others may be removing."""


class NoLocks(OSError):
    """The file system has none."""


class Held(BadInput):
    """Another process writes here."""


def run_around(path: Path) -> Path | None:
    """The run directory that a path is, or lies in."""
    if (path / RUN).is_file():
        return path
    whole = Path(os.path.abspath(path))
    return next((parent for parent in whole.parents if (parent / RUN).is_file()), None)


@contextmanager
def writing(*folders: Path) -> Iterator[None]:
    """Hold the run directories that these folders are or lie in, or else the folders themselves:
    see `one_writer`."""
    found = (run_around(folder) or folder for folder in folders)
    wanted = {os.path.realpath(folder): folder for folder in found}
    with ExitStack() as held:
        for name in sorted(wanted):
            held.enter_context(one_writer(wanted[name]))
        yield


@contextmanager
def writing_inside(path: Path) -> Iterator[None]:
    """Hold the run directory that a path lies in, if it lies in one."""
    run = run_around(path)
    with writing(*([run] if run else [])):
        yield


@contextmanager
def one_writer(folder: Path) -> Iterator[None]:
    """Hold a folder, which is made if it is not there and removed again if it stays empty.

    Raises Held with the number of the process that holds it. On a file system without locks a
    note on standard error says that nothing is held.
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
        except FileNotFoundError:  # removed by the one that had made it
            if attempt == ATTEMPTS - 1:
                raise
    raise AssertionError


def acquire(folder: Path) -> int:
    """An open file that holds the lock in a folder.

    Raises BlockingIOError if another process holds it, NoLocks if the file system has none.
    """
    path = folder / LOCK
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            _flock(file)
            # Whoever held it before may have removed it in the meantime.
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
    if lock is not None:
        os.close(lock)


def holder(folder: Path) -> str:
    """ "process 12", which holds the lock in a folder."""
    for _ in range(20):
        with suppress(OSError, ValueError):
            number, host = (folder / LOCK).read_text().split()
            if host != socket.gethostname():
                return f"process {number} on {host}"
            with suppress(PermissionError):  # another user's
                os.kill(int(number), 0)
            return f"process {number}"
        time.sleep(0.05)  # it has just begun, and not said yet who it is
    return "another process"
