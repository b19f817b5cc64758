"""Connect the processes that train together, and notice when one of them ends.

Process 0 listens at the address until all processes have connected; then JAX uses the port. The
connections stay open. When a process ends in any way, the operating system closes its connections,
so that the others end with a one-line error instead of waiting in a collective. This module does
not import JAX.
"""

from __future__ import annotations

import atexit
import os
import re
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from mukv.core.errors import BadInput, Failed
from mukv.show.output import Tell

WAIT_SECONDS = 300.0
"""Time that a process waits for the others to connect."""
TELL_SECONDS = 5.0
"""Time after which a process reports which processes it waits for. It repeats the report every
`TELL_AGAIN_SECONDS`."""
TELL_AGAIN_SECONDS = 60.0
GRACE_SECONDS = 20.0
"""Time within which a process can still end with its own error after another process failed."""
SETTLE_SECONDS = 5.0
"""Time that a process with an error waits for the notice that another process was lost, which would
be the cause."""
MOST_PROCESSES = 1 << 16
EXAMPLE = "auto, or HOST:PORT,PROCESSES,NUMBER such as 10.0.0.1:9000,2,0"


class Place(NamedTuple):
    """Position of this process in the job.

    host, port: address of process 0
    processes: number of processes
    number: number of this process, from 0
    """

    host: str
    port: int
    processes: int
    number: int

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse(text: str) -> Place:
    """Parse HOST:PORT,PROCESSES,NUMBER, with an IPv6 address in brackets. Raises BadInput for other
    texts, and for a host without an address."""
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[^\s:,\[\]]+):(\d{1,9}),(\d{1,9}),(\d{1,9})", text)
    if match is None or not text.isascii():
        raise BadInput("--distributed", text, EXAMPLE)
    host, (port, processes, number) = match[1].strip("[]"), map(int, match.groups()[1:])
    if not 1 <= port <= 65535:
        raise BadInput("--distributed", text, "PORT goes from 1 to 65535")
    if not 1 <= processes <= MOST_PROCESSES:
        raise BadInput("--distributed", text, f"PROCESSES goes from 1 to {MOST_PROCESSES:,}")
    if not number < processes:
        raise BadInput("--distributed", text, f"NUMBER is at most PROCESSES - 1 ({processes - 1})")
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or "not a host name"
        raise BadInput("--distributed", text, f"a HOST that has an address ({reason})") from None
    return Place(host, port, processes, number)


class Watch:
    """The connections between processes.

    As a context manager it tells the other processes whether the block succeeded, and ends this
    process with a one-line error if another process is lost. The error names the newest checkpoint
    in the folder `checkpoints`.
    """

    def __init__(self, place: Place, peers: dict[int, socket.socket]):
        self.place, self.peers = place, peers
        self.checkpoints: Path | None = None
        self.lost: int | None = None
        self.noticed, self.alone = threading.Event(), threading.Event()
        self.ended = False
        self.leaving = threading.Lock()
        threading.Thread(target=self._watch, daemon=True).start()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        self.ended = True
        if error is None:
            self._send("bye")
        elif isinstance(error, BadInput | Failed | KeyboardInterrupt | SystemExit):
            self._send("failed")
            # Runs before JAX's own exit handler, which would wait for processes that have ended,
            # and abort.
            atexit.register(self._leave_after_others, getattr(error, "status", 1))
        # An error of a collective arrives shortly before or after the notice of its cause.
        elif self.noticed.wait(SETTLE_SECONDS):
            self.leave()

    def _leave_after_others(self, status: int) -> None:
        """End this process when the others have failed too, or after the time within which they
        notice the failure."""
        self.alone.wait(GRACE_SECONDS + SETTLE_SECONDS)
        if self.place.number == 0:  # JAX aborts the others as soon as this process ends
            time.sleep(1)
        sys.stdout.flush()
        os._exit(status)

    def leave(self) -> None:
        """End this process with a one-line error that names the lost process. JAX's own exit
        handler is skipped, because it would wait for the lost process and then abort."""
        self.leaving.acquire()  # never released: one thread prints the line
        sys.stdout.flush()
        os.write(2, f"error: {self.line()}\n".encode())
        os._exit(1)

    def line(self) -> str:
        gone = f"process {self.lost} of {self.place.processes} is gone"
        steps = [
            int(path.name)
            for path in (self.checkpoints.glob("*") if self.checkpoints else ())
            if path.name.isdecimal()
        ]
        if not steps:
            return f"{gone}; there is no checkpoint yet"
        folder = self.checkpoints.parent if self.checkpoints else ""
        saved = f"the last checkpoint is {max(steps)} in {folder}"
        return f"{gone}; {saved}: the same commands go on from there"

    def _send(self, line: str) -> None:
        for peer in self.peers.values():
            try:
                peer.sendall(f"{line}\n".encode())
            except OSError:
                continue

    def _watch(self) -> None:
        selector = selectors.DefaultSelector()
        for number, peer in self.peers.items():
            peer.settimeout(None)
            selector.register(peer, selectors.EVENT_READ, number)
        connected = set(self.peers)
        while connected:
            for key, _ in selector.select():
                try:
                    words = os.read(key.fd, 256).decode(errors="replace").split()
                except OSError:
                    words = []
                known, word = key.data in connected, words[0] if words else "lost"
                relayed = int(words[1]) if len(words) > 1 and words[1].isdecimal() else None
                if relayed is None:
                    connected.discard(key.data)
                if not words:
                    selector.unregister(key.fileobj)
                if known and word != "bye":
                    self._notice(word, key.data if relayed is None else relayed)
        self.alone.set()

    def _notice(self, word: str, number: int) -> None:
        """Handle the failure or loss of another process.

        word: "failed" or "lost"
        number: number of the process

        The others are informed. This process ends at once, or, after a failure, if it has not ended
        by itself within `GRACE_SECONDS`.
        """
        if self.lost is not None:
            return
        self.lost = number
        self._send(f"{word} {number}")
        self.noticed.set()
        timer = threading.Timer(GRACE_SECONDS if word == "failed" else 0, self._end)
        timer.daemon = True
        timer.start()

    def _end(self) -> None:
        if not self.ended:
            self.leave()


def meet(place: Place, tell: Tell) -> Watch:
    """Wait until all processes have connected.

    tell: called with a line that names the missing processes

    Raises BadInput if the port can't be used, or if process 0 belongs to another job, and Failed if
    not all have connected after `WAIT_SECONDS`.
    """
    peers = _gather(place, tell) if place.number == 0 else {0: _join(place, tell)}
    return Watch(place, peers)


@contextmanager
def telling_wait(whom: str, tell: Tell) -> Iterator[None]:
    """Report after 5 s, and again every minute, that the block waits for `whom`."""
    over = threading.Event()

    def wait() -> None:
        pause = TELL_SECONDS
        while not over.wait(pause):
            tell(f"waiting for {whom} (up to {WAIT_SECONDS:.0f} s)")
            pause = TELL_AGAIN_SECONDS

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _patience(place: Place, missing: Callable[[], str], tell: Tell) -> Callable[[], None]:
    """Return a function to call repeatedly while waiting. It reports the missing processes, and
    raises Failed after `WAIT_SECONDS`.

    missing: returns the names of the missing processes
    """
    began, next_report = time.monotonic(), [TELL_SECONDS]

    def check() -> None:
        waited = time.monotonic() - began
        if waited > WAIT_SECONDS:
            reason = f"{missing()} did not come to {place.address} in {WAIT_SECONDS:.0f} s"
            raise Failed(f"--distributed: {reason}")
        if waited > next_report[0]:
            next_report[0] = waited + TELL_AGAIN_SECONDS
            tell(f"waiting for {missing()} at {place.address} (up to {WAIT_SECONDS:.0f} s)")

    return check


def _gather(place: Place, tell: Tell) -> dict[int, socket.socket]:
    """Accept a connection from each other process, then let all continue. Runs in process 0."""
    peers: dict[int, socket.socket] = {}

    def missing() -> str:
        away = [number for number in range(1, place.processes) if number not in peers]
        shown = ", ".join(map(str, away[:8])) + (", ..." if len(away) > 8 else "")
        return f"process {shown} of {place.processes}"

    check = _patience(place, missing, tell)
    try:
        dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if dual else socket.AF_INET
        server = socket.create_server(("", place.port), family=family, dualstack_ipv6=dual)
    except OSError as error:
        raise BadInput(
            "--distributed", place.address, f"a PORT that is free here ({error.strerror})"
        ) from None
    with server:
        server.settimeout(0.2)
        while len(peers) < place.processes - 1:
            check()
            try:
                peer, _ = server.accept()
            except TimeoutError:
                continue
            number, refusal = _introduced(peer, place, peers)
            if number is None:
                _say(peer, f"no {refusal}")
                peer.close()
            else:
                peers[number] = peer
    for peer in peers.values():
        _say(peer, "go")
    return peers


def _introduced(
    peer: socket.socket, place: Place, known: dict[int, socket.socket]
) -> tuple[int | None, str]:
    """Return the number of a process that has connected and an empty text, or None and the reason
    why it is refused."""
    peer.settimeout(2)
    try:
        words = peer.recv(64).decode().split()
        word, number, processes = words[0], int(words[1]), int(words[2])
    except (OSError, ValueError, IndexError):
        return None, "not a process of mukv"
    if word != "mukv" or processes != place.processes:
        return None, f"process 0 was started for {place.processes} processes"
    if not 1 <= number < processes or number in known:
        return None, f"there is another process {number}"
    return number, ""


def _say(peer: socket.socket, line: str) -> None:
    try:
        peer.sendall(f"{line}\n".encode())
    except OSError:
        return


def _join(place: Place, tell: Tell) -> socket.socket:
    """Connect to process 0 and wait until it sends "go". Runs in all other processes."""
    here = False

    def missing() -> str:
        return f"{'the others' if here else 'process 0'} of {place.processes}"

    check = _patience(place, missing, tell)
    while True:
        check()
        try:
            peer = socket.create_connection((place.host, place.port), timeout=2)
        except OSError:
            time.sleep(0.2)
            continue
        _say(peer, f"mukv {place.number} {place.processes}")
        here, reply = True, b""
        peer.settimeout(0.5)
        while not reply:
            check()
            try:
                reply = peer.recv(256)
            except TimeoutError:
                continue
            except OSError:
                reply = b""
            if not reply:  # closed: process 0 ended, or another program listens there
                break
        words = reply.decode(errors="replace").strip()
        if words == "go":
            return peer
        peer.close()
        if words.startswith("no "):
            allowed = f"must fit process 0: {words[3:]}"
            raise BadInput("--distributed", f"{place.address}, process {place.number}", allowed)
        here = False
        time.sleep(0.5)
