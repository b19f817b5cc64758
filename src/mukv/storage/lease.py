"""Leases, so that only one process writes to a folder of an object store at a time.

An object store has no lock that ends with its process. A lease is an object `.mukv/lease-N` with
the writer and the time of its last renewal. The highest N counts. A lease that was given up, or not
renewed for SECONDS, is taken over by creating N + 1, which only one process can do; the former
holder finds the higher number when it renews its own, and stops. Clocks must agree within seconds.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from mukv.core.errors import Failed
from mukv.storage.locks import Held
from mukv.storage.objects import Objects

SECONDS = 60.0
"""Age at which a lease has run out."""
RENEWED_EVERY = 15.0
FOLDER = ".mukv"


class Lost(Failed):
    """Another process has taken the lease over."""


@dataclass(frozen=True)
class Holder:
    """Content of a lease.

    copy: identity of the local copy that has everything that was written; "" for none
    time: seconds since 1970 of the last renewal; 0 once it is given up
    """

    host: str
    process: int
    copy: str
    time: float

    @property
    def ended(self) -> bool:
        """Whether the lease was given up or has run out, or its process on this host has ended."""
        if time.time() - self.time > SECONDS:
            return True
        if self.host != socket.gethostname() or self.process == os.getpid():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
        return False


def latest(store: Objects, names: dict[str, str] | None = None) -> tuple[int, Holder | None]:
    """Return number and content of the lease that counts; 0 and None if there is none.

    names: listing of the store; None to list it
    """
    numbers = _numbers(store.list() if names is None else names)
    if not numbers:
        return 0, None
    text = store.read(_name(max(numbers)))
    with suppress(ValueError, TypeError):
        return max(numbers), Holder(**json.loads(text or b""))
    return max(numbers), None


class Lease:
    """A lease that this process holds."""

    def __init__(self, store: Objects, number: int, holder: Holder):
        self.store, self.number, self.holder = store, number, holder

    @classmethod
    def taken(cls, store: Objects, tell: Callable[[str], None]) -> tuple[Lease, str]:
        """Take the lease; return it, and the identity of the copy that the holder before had.

        While the holder before may still run, waits until its lease runs out. tell: called with a
        line of text before waiting. Raises Held if it is renewed.
        """
        told, seen = False, None
        while True:
            number, before = latest(store)
            if before is not None and not before.ended:
                who = f"process {before.process} on {before.host}"
                if seen not in (None, before):
                    given = f"a folder that {who} is writing"
                    raise Held(store.url, given, "wait until it has ended, or another folder")
                if not told:
                    tell(f"{store.url}: waiting up to {SECONDS:.0f} s for {who} to end")
                told, seen = True, before
                time.sleep(1)
                continue
            mine = Holder(socket.gethostname(), os.getpid(), "", time.time())
            if store.create(_name(number + 1), _content(mine)):
                store.delete(_name(each) for each in range(max(1, number - 9), number + 1))
                return cls(store, number + 1, mine), "" if before is None else before.copy

    def renew(self, copy: str | None = None) -> None:
        """Renew the lease if it is due. Raises Lost if another process has taken it over.

        copy: identity of this process's copy, once it has everything; written at once
        """
        if copy is None and time.time() - self.holder.time < RENEWED_EVERY:
            return
        self._require()
        self.holder = replace(self.holder, copy=copy or self.holder.copy, time=time.time())
        self.store.write(_name(self.number), _content(self.holder))

    def give_up(self) -> None:
        """End the lease, so that the next writer need not wait."""
        self._require()
        self.store.write(_name(self.number), _content(replace(self.holder, time=0.0)))

    def _require(self) -> None:
        if latest(self.store)[0] != self.number:
            raise Lost(f"{self.store.url}: another process has taken over; nothing more is written")


def _name(number: int) -> str:
    return f"{FOLDER}/lease-{number:08d}"


def _numbers(names: dict[str, str]) -> list[int]:
    start = f"{FOLDER}/lease-"
    found = (name.removeprefix(start) for name in names if name.startswith(start))
    return [int(number) for number in found if number.isdecimal()]


def _content(holder: Holder) -> bytes:
    return json.dumps(asdict(holder)).encode()
