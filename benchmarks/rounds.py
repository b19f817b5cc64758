"""Compare speeds fairly: contenders stay warm in their own processes and alternate.

A machine's speed drifts, and another program on one core can slow a thread pool several times over.
So contenders alternate within every round, ratios are computed within rounds, and before each turn
we wait briefly for idle cores and record how many were busy with other work. The first round is
discarded.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mukv.cli.launch import ALLOCATOR

HERE = Path(__file__).parent
QUIET = 0.3
"""Number of cores busy with other work up to which the machine counts as idle."""
PATIENCE = 0.3
"""Seconds that a turn waits for an idle machine."""
LONGEST_ANSWER = 300.0


class Refused(Exception):
    """Raised if a worker could not do what was requested; the message is one line."""


class Worker:
    """A process that answers each JSON line with another, and sleeps in between."""

    def __init__(self, script: str, python: str = sys.executable, allocator: bool = False):
        """allocator: whether it gets the memory settings that `mukv` uses"""
        environment = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        if allocator:
            environment["GLIBC_TUNABLES"] = ALLOCATOR
        self.process = subprocess.Popen(
            [python, str(HERE / script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """Return the answer to a request. Raises Refused for an error or a timeout, after which the
        worker is dead.
        """
        asked, told = self.process.stdin, self.process.stdout
        assert asked
        assert told
        try:
            asked.write(json.dumps(request) + "\n")
            asked.flush()
        except OSError as error:
            raise Refused("the worker has ended") from error
        if not select.select([told], [], [], LONGEST_ANSWER)[0]:
            self.close()
            raise Refused(f"no answer within {LONGEST_ANSWER:.0f} s")
        answer = json.loads(told.readline() or '{"error": "the worker has ended"}')
        if "error" in answer:
            raise Refused(answer["error"])
        return answer

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


@dataclass
class Contender:
    """One side of a comparison. request: fields of its `setup` request besides the case."""

    name: str
    worker: Worker
    request: Mapping[str, Any]
    told: dict[str, Any] = field(default_factory=dict)
    answers: list[dict[str, float]] = field(default_factory=list)
    why_not: str | None = None

    def turn(self, least: float) -> None:
        """Run one round: as many steps as fill `least` seconds."""
        total: dict[str, float] = {}
        steps = 0
        while not steps or (total["seconds"] < least and steps < 1000):
            for key, value in self.worker.ask(op="round").items():
                total[key] = total.get(key, 0.0) + value
            steps += 1
        self.answers.append({key: value / steps for key, value in total.items()})

    def per_second(self, amount: float, key: str = "seconds") -> list[float]:
        """Return `amount` divided by the time of each round; empty if the contender did not take
        part.
        """
        return [amount / answer[key] for answer in self.answers]


@dataclass
class Case:
    """Results of all contenders with one set of dimensions.

    busy: cores busy with other work, per round
    """

    contenders: list[Contender]
    busy: list[float]

    def ratios(self, one: Contender, other: str, key: str = "seconds") -> list[float]:
        """Return how many times faster `one` was than the one called `other`, per round."""
        for peer in self.contenders:
            if peer.name == other:
                pairs = zip(one.answers, peer.answers, strict=False)
                return [theirs[key] / mine[key] for mine, theirs in pairs]
        return []


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def compare(
    contenders: Sequence[Contender],
    case: Mapping[str, Any],
    rounds: int,
    least: float,
    limit: float,
    say: Console,
) -> Case:
    """Set up all contenders for the case, then alternate; the first of `rounds` + 1 rounds is
    discarded.

    limit: seconds after which no further round begins, once two have counted
    """
    taking_part = []
    for contender in contenders:
        say.print(f"[dim]  {contender.name}: setting up[/]")
        contender.answers, contender.why_not = [], None
        try:
            contender.told = contender.worker.ask(op="setup", **case, **contender.request)
            taking_part.append(contender)
        except Refused as error:
            contender.why_not = str(error)
            say.print(f"  {contender.name}: {error}", markup=False)
    began, busy = time.monotonic(), []
    for number in range(rounds + 1):
        if number > 2 and time.monotonic() - began > limit:
            break
        for contender in list(taking_part):
            busy.append(wait_for_quiet())
            try:
                contender.turn(least)
            except Refused as error:
                contender.why_not = str(error)
                taking_part.remove(contender)
        if not number:
            busy.clear()
            for contender in contenders:
                contender.answers.clear()
    return Case(list(contenders), busy)


def wait_for_quiet() -> float:
    """Wait at most PATIENCE seconds for an idle machine; return the number of busy cores."""
    deadline = time.monotonic() + PATIENCE
    while True:
        busy = _busy_cores()
        if busy <= QUIET or time.monotonic() > deadline:
            return busy


def _busy_cores(seconds: float = 0.15) -> float:
    """Return how many of the usable cores are busy while this process sleeps; 0 if unknown."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return 0.0
    mine = {f"cpu{number}" for number in os.sched_getaffinity(0)}

    def ticks() -> tuple[int, int]:
        whole, idle = 0, 0
        for line in stat.read_text().splitlines():
            name, *rest = line.split()
            if name in mine:
                # user, nice, system, idle, iowait, interrupts, soft interrupts, other guests
                numbers = [int(word) for word in rest[:8]]
                whole, idle = whole + sum(numbers), idle + numbers[3] + numbers[4]
        return whole, idle

    whole, idle = ticks()
    time.sleep(seconds)
    whole_after, idle_after = ticks()
    return (1 - (idle_after - idle) / max(whole_after - whole, 1)) * len(mine)


def cores() -> int:
    """Return the number of cores that this process, and so its workers, may use."""
    known = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if known else os.cpu_count() or 1


def keep_to(number: int | None) -> None:
    """Restrict this process, and workers started from now on, to the first `number` cores."""
    if number and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:number])


def find_peers(python: str | None) -> tuple[str, str | None]:
    """Return the Python that runs the peers, and why it can't, if it can't."""
    python = python or sys.executable
    check = "import torch, transformers"
    try:
        subprocess.run([python, "-c", check], check=True, capture_output=True, text=True)
    except OSError as error:
        return python, f"{python}: {error.strerror}"
    except subprocess.CalledProcessError as error:
        reason = error.stderr.strip().splitlines()[-1]
        return python, (
            f"{python}: {reason}; name a Python that has torch and transformers with --peers "
            "(pip install 'mukv[peers]', best in an environment of its own)"
        )
    return python, None


def processor() -> str:
    """Return the name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def versions(contenders: Sequence[Contender]) -> dict[str, Any]:
    """Return machine, devices, versions and threads, as reported by the workers."""
    found: dict[str, Any] = {
        "processor": processor(),
        "cores": cores(),
        "python": platform.python_version(),
    }
    for contender in contenders:
        for key in ("device", "jax", "torch", "transformers", "threads"):
            if key in contender.told:
                name = key if key not in ("device", "threads") else f"{key} of {contender.name}"
                found[name] = contender.told[key]
    return found


def names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def parser(description: str) -> argparse.ArgumentParser:
    """Make a parser with the options that both benchmarks share."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--rounds", type=int, help="rounds after a discarded first one; default 5")
    made.add_argument("--peers", metavar="PYTHON", help="Python with torch and transformers")
    made.add_argument(
        "--cores",
        type=int,
        help="number of cores that all contenders use; default: all",
    )
    made.add_argument(
        "--out", type=Path, metavar="FILE.json", help="write all results to this file"
    )
    made.add_argument("--quick", action="store_true", help="run a small part, in under two minutes")
    return made


def show(found: float | None, form: str = ",.0f") -> str:
    return "-" if found is None else format(found, form)


def table(title: str, columns: Sequence[str]) -> Table:
    """Make a table with right-aligned numbers; the first column is a name."""
    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="right" if number else "left", no_wrap=True)
    return made


def report(rows: list[dict[str, Any]], told: dict[str, Any], busy: float, out: Path | None) -> None:
    """Print the notes below the tables, and write the file."""
    console = Console()
    console.print(", ".join(f"{name} {value}" for name, value in told.items()))
    if busy > QUIET:
        console.print(
            f"[yellow]{busy:.1f} cores were busy with something else (median): torch loses more "
            "by that than JAX, so these ratios flatter us. Repeat on a quiet machine.[/]"
        )
    if out:
        text = json.dumps({"machine": told, "foreign_busy_cores": busy, "rows": rows}, indent=1)
        out.write_text(text + "\n")
        console.print(f"written: {out}")
