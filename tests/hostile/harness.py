"""Check that a call on hostile input ends in one clear error, within limits of time and memory.

A test generates inputs and calls `check_all`; the number of inputs by area is printed at the end
of a run of the tests.
"""

from __future__ import annotations

import math
import resource
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mukv.core.errors import BadInput, Failed

SECONDS, MEGABYTES, CHARACTERS = 10, 2048, 1000

Record = Callable[[str, Any], None]


def check_all(
    area: str, inputs: Iterable[tuple[str, Callable[[], Any]]], record_property: Record
) -> Counter[str]:
    """Call every input and count the answers: "accepted" or "refused".

    inputs: pairs of a label and a call. record_property: pytest's fixture. Raises AssertionError
    that lists every input (at most 20 are shown) with any other answer.
    """
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for label, call in inputs:
        try:
            counts[answer(call)] += 1
        except AssertionError as error:
            wrong.append(f"{label[:300]}: {str(error)[:600]}")
    record_property("hostile", (area, dict(counts)))
    assert not wrong, f"{len(wrong)} of {len(wrong) + counts.total()}:\n" + "\n".join(wrong[:20])
    return counts


def answer(call: Callable[[], Any]) -> str:
    """Return "accepted" or "refused".

    Raises AssertionError if the call raises anything but BadInput or Failed, takes over 10 s of
    work
    or 2 GB, or if its message is empty or longer than 1,000 characters.
    """
    try:
        with limits():
            call()
    except (BadInput, Failed) as error:
        message = str(error)
        assert message.strip(), "an error without a text"
        assert len(message) <= CHARACTERS, f"{len(message)} characters: {message[:100]}..."
        return "refused"
    except AssertionError:
        raise
    except BaseException as error:  # a panic of a Rust library is not an Exception
        if isinstance(error, KeyboardInterrupt):
            raise
        raise AssertionError(f"{type(error).__name__}: {error}") from error
    return "accepted"


@contextmanager
def limits(seconds: float = SECONDS, megabytes: float = MEGABYTES) -> Iterator[None]:
    """Raise AssertionError if the block takes longer or its memory grows by more."""

    def expire(*_: object) -> None:
        raise AssertionError(f"over {seconds} s")

    # Work takes longer on a busy machine, so that the limit on elapsed time is six times larger.
    timers = {signal.ITIMER_PROF: seconds, signal.ITIMER_REAL: 6 * seconds}
    before = _status("VmRSS")
    handlers = {n: signal.signal(n, expire) for n in (signal.SIGALRM, signal.SIGPROF)}
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = (_status("VmData") + 1.5 * megabytes) * 1e6
    resource.setrlimit(
        resource.RLIMIT_DATA, (int(most) if hard < 0 else min(int(most), hard), hard)
    )
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    for timer, after in timers.items():
        signal.setitimer(timer, after)
    try:
        yield
    finally:
        for timer in timers:
            signal.setitimer(timer, 0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
    grown = _status("VmHWM") - before
    assert grown <= megabytes, f"{math.ceil(grown)} MB"


def _status(key: str) -> float:
    """Return a memory figure of this process in megabytes, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    return math.nan
