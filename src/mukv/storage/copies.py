"""Local copies of folders in object stores: what s3:// and gs:// addresses stand for.

Every command works on a copy in the cache, with the files, locks and renames of a local folder.
`fetched` brings a copy up to date. `Copy.written` also sends back what changes, from a thread while
the command runs and at its end. A file is sent whole after it was put into place by a rename. A
checkpoint counts in the store only if it has its manifest, which is sent last and deleted first; so
a writer that is killed leaves complete checkpoints, and objects that nobody reads until the next
writer deletes them. The holder of the lease (lease.py) writes; its content says which copy has
everything, so that a command that goes on where it was killed keeps what was not sent yet.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path

from mukv.core.errors import BadInput, Failed
from mukv.storage import lease
from mukv.storage.failed_saves import UNFINISHED
from mukv.storage.files import cache_folder, temporary, write_atomic
from mukv.storage.lease import Lease
from mukv.storage.locks import Held, acquire, holder, release
from mukv.storage.objects import Objects, address

SENT_EVERY = 10.0
"""Seconds between two looks for changed files."""
MANIFEST = "manifest/metadata"
"""File of a checkpoint that is sent last (storage/checkpoint.py writes it)."""
LAST = ("meta.json", "config.json", "config.yaml")
"""Files that say what a folder is; sent after all others."""
OPEN = ("study.db", "study.db-journal", "study.db-wal")
"""Databases, which are sent at the end only."""
Known = dict[str, tuple[str, int, int]]
"""Stamp of each object's content, with size and time of change of the local file, by name."""


def fetched(path: str | Path) -> Path:
    """Return the up-to-date local copy of an address, or else the path itself.

    A copy that a command on this machine is writing to is returned as it is. Raises BadInput for an
    address without objects, and as `Objects` does.
    """
    url = address(path)
    if url is None:
        return Path(path)
    copy = Copy(url)
    with copy.fetching(), copy.alone() as free:
        there = copy.bring_up_to_date() if free else True
    if not there:
        raise BadInput(url, "nothing", "the address of a run directory, a token file or a model")
    return copy.folder


class Copy:
    """The local copy of one address.

    folder: where the copy is
    """

    def __init__(self, url: str):
        self.url = url
        digest = hashlib.sha256(url.encode()).hexdigest()[:16]
        self.base = cache_folder() / "objects" / digest
        self.folder = self.base / url.rpartition("/")[2]
        self.lease: Lease | None = None
        self.known: Known = {}
        self.troubled = False

    @cached_property
    def store(self) -> Objects:
        return Objects(self.url)

    # Locks between processes of this machine

    @contextmanager
    def fetching(self) -> Iterator[None]:
        """Hold the lock under which the copy is changed by the store's content; waits for it."""
        place = self.base / "fetching"
        place.mkdir(parents=True, exist_ok=True)
        (self.base / "url").write_text(self.url)
        while True:
            try:
                lock = acquire(place)
                break
            except BlockingIOError:
                time.sleep(0.1)
        try:
            yield
        finally:
            release(lock)

    @contextmanager
    def alone(self) -> Iterator[bool]:
        """Try to hold the lock of writers; yield whether this process holds it."""
        place = self.base / "writing"
        place.mkdir(parents=True, exist_ok=True)
        lock = None
        with suppress(BlockingIOError):
            lock = acquire(place)
        try:
            yield lock is not None
        finally:
            release(lock)

    # From the store

    def bring_up_to_date(self, mine: bool | None = None) -> bool:
        """Make the copy what the store has; return whether the store has anything.

        mine: whether the copy has everything that was ever written; None to ask the lease
        """
        names = self.store.list()
        if mine is None:
            written_by = lease.latest(self.store, names)[1]
            mine = written_by is not None and written_by.copy == self.identity
        there = complete(names)
        self.known = self._recorded()
        if mine:
            return bool(there) or self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._record({})  # the content of a partly changed copy is unknown
        here = self._files(everything=True)
        same = {
            name
            for name, (stamp, *facts) in self.known.items()
            if there.get(name) == stamp and here.get(name) == tuple(facts)
        }
        for name in here.keys() - same:
            (self.folder / name).unlink(missing_ok=True)
        for step in {_step(name) for name in here.keys() - same} - {None}:
            shutil.rmtree(self.folder / str(step), ignore_errors=True)
            same = {name for name in same if _step(name) != step}
        self._fetch(sorted(there.keys() - same))
        here = self._files(everything=True)
        self.known = {name: (stamp, *here[name]) for name, stamp in there.items() if name in here}
        self._record(self.known)
        return bool(there)

    def _fetch(self, names: list[str]) -> None:
        """Fetch objects; a checkpoint becomes visible when all of its files are there."""
        for step in {_step(name) for name in names} - {None}:
            with temporary(self.folder / str(step)) as made:
                for name in names:
                    if _step(name) == step:
                        path = made / Path(name).relative_to(str(step))
                        path.parent.mkdir(parents=True, exist_ok=True)
                        self.store.fetch(name, path)
                os.rename(made, self.folder / str(step))
        for name in names:
            if _step(name) is None:
                with temporary(self.folder / name) as made:
                    self.store.fetch(name, made)
                    os.replace(made, self.folder / name)

    # To the store

    @contextmanager
    def written(self) -> Iterator[Path]:
        """Yield the up-to-date copy for writing, and send what changes.

        Raises Held if another process writes to the address, and Failed at the end if the store
        can't be written; the copy then keeps what was not sent.
        """
        with self.alone() as free:
            if not free:
                who = holder(self.base / "writing")
                given = f"a folder that {who} is writing"
                raise Held(self.url, given, "wait until it has ended, or choose another folder")
            with self.fetching():
                self.lease, before = Lease.taken(self.store, _say)
                self.bring_up_to_date(before == self.identity)
                self.lease.renew(self.identity)
            over = threading.Event()
            thread = threading.Thread(target=self._keep_sending, args=(over,), daemon=True)
            thread.start()
            try:
                yield self.folder
            except BaseException:
                self._stop_sending(over, thread)
                with suppress(BadInput, Failed):  # the exception that ended the block has priority
                    self._finish()
                raise
            self._stop_sending(over, thread)
            self._finish()

    def _stop_sending(self, over: threading.Event, thread: threading.Thread) -> None:
        over.set()
        thread.join()

    def _finish(self) -> None:
        assert self.lease is not None
        self.send(at_the_end=True)
        self.lease.give_up()

    def _keep_sending(self, over: threading.Event) -> None:
        while not over.wait(SENT_EVERY):
            try:
                self.send()
                self.troubled = False
            except lease.Lost:
                os.kill(
                    os.getpid(), signal.SIGTERM
                )  # a training run saves a checkpoint here, and ends
                return
            except (BadInput, Failed) as error:
                if not self.troubled:
                    _say(f"{error}; trying again every {SENT_EVERY:.0f} s")
                self.troubled = True

    def send(self, at_the_end: bool = False) -> int:
        """Send the files that were changed or deleted since the last time; return their number."""
        assert self.lease is not None
        self.lease.renew()
        here = self._files(everything=at_the_end)
        gone = [name for name in self.known if name not in here and Path(name).name not in OPEN]
        changed = [name for name, facts in here.items() if self.known.get(name, ())[1:] != facts]
        if not gone and not changed:
            return 0
        self.store.delete(sorted(gone, key=lambda name: not name.endswith(MANIFEST)))
        for name in gone:
            del self.known[name]
        sent: list[str] = []
        for name in sorted(changed, key=_order):
            if name.endswith(MANIFEST):
                files = [each for each in here if _step(each) == _step(name)]
                if not all(each in sent or each in self.known or each == name for each in files):
                    continue  # deleted here while it was being sent
            with suppress(FileNotFoundError):
                self.store.send(self.folder / name, name)
                sent.append(name)
        names = self.store.list()
        for name in sent:
            self.known[name] = (names.get(name, ""), *here[name])
        self.store.delete(_abandoned(names, here))
        self._record(self.known)
        return len(sent) + len(gone)

    # Records of the copy's state

    @cached_property
    def identity(self) -> str:
        """A name of this copy, which is unique among machines."""
        path = self.base / "identity"
        if not path.exists():
            write_atomic(path, uuid.uuid4().hex)
        return path.read_text()

    def _recorded(self) -> Known:
        with suppress(OSError, ValueError):
            text = (self.base / "known.json").read_text()
            return {name: tuple(facts) for name, facts in json.loads(text).items()}
        return {}

    def _record(self, known: Known) -> None:
        write_atomic(self.base / "known.json", json.dumps(known))

    def _files(self, everything: bool) -> dict[str, tuple[int, int]]:
        """Return size and time of change of all finished files of the copy, by name.

        everything: whether databases count, which others may be writing
        """
        found: dict[str, tuple[int, int]] = {}
        for parent, folders, files in os.walk(self.folder):
            folders[:] = [name for name in folders if not _private(name)]
            for file in files:
                if _private(file) or (file in OPEN and not everything):
                    continue
                path = Path(parent, file)
                with suppress(FileNotFoundError):
                    facts = path.stat()
                    name = path.relative_to(self.folder).as_posix()
                    found[name] = (facts.st_size, facts.st_mtime_ns)
        whole = complete(dict.fromkeys(found, ""))
        return {name: facts for name, facts in found.items() if name in whole}


def complete(names: dict[str, str]) -> dict[str, str]:
    """Leave out hidden objects, and checkpoints without a manifest."""
    whole = {_step(name) for name in names if name.endswith(f"/{MANIFEST}")}
    return {
        name: stamp
        for name, stamp in names.items()
        if not any(part.startswith(".") for part in name.split("/"))
        and _step(name) in (None, *whole)
    }


def _abandoned(names: dict[str, str], here: Iterable[str]) -> list[str]:
    """Return the objects of checkpoints without a manifest that are not of a checkpoint here: a
    writer was killed while it sent or deleted them."""
    sending = {_step(name) for name in here}
    visible = [name for name in names if not name.startswith(".")]
    whole = complete(names)
    return [name for name in visible if name not in whole and _step(name) not in (None, *sending)]


def _step(name: str) -> str | None:
    """Return the folder of the checkpoint that a file belongs to; None for other files."""
    parts = name.split("/")
    for place, part in enumerate(parts[1:-1], start=1):
        if part.isdecimal() and parts[place - 1] == "checkpoints":
            return "/".join(parts[: place + 1])
    return None


def _order(name: str) -> tuple[int, str]:
    """Return the place of a file in the order of sending: what completes others comes last."""
    if name.endswith(MANIFEST):
        return 1, name
    return (2 if name.rpartition("/")[2] in LAST else 0), name


def _private(name: str) -> bool:
    """Whether a file or folder is hidden, such as a lock, or a checkpoint that is being written."""
    return name.startswith(".") or UNFINISHED in name


def _say(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def shown(path: Path) -> str:
    """Return the address that a path in a copy stands for, or else the path itself."""
    objects = cache_folder() / "objects"
    with suppress(ValueError):
        digest, *rest = path.relative_to(objects).parts
        url = (objects / digest / "url").read_text() if rest else ""
        return "/".join((url, *rest[1:])) if url else str(path)
    return str(path)
