"""Measure everything that needs a GPU within a number of minutes, the most important part first.

Run: python benchmarks/gpu.py --minutes 9
     python benchmarks/gpu.py --dry-run      # tiny shapes on whatever device there is

The parts of `on_device.PARTS` are run in their order, each in a process of its own that is killed
at the part's limit. Every row is written as soon as it is measured, to rows.jsonl in
benchmarks/results/DEVICE-DATE/; table.md shows all of them. A repeated command continues: a case
with a result is not measured again, and cases that failed in an earlier start come last. A
training step is measured beside a decoder in bare torch at equal shapes (peers.py), whose attention
is scaled_dot_product_attention, which is FlashAttention on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROWS, TABLE = "rows.jsonl", "table.md"
LEAST = 20.0
"""Seconds that must be left for a part to begin."""
Row = dict[str, Any]


@dataclass(frozen=True)
class Work:
    """Cases of one part, to be measured by one process. limit: seconds after which it is killed"""

    part: str
    cases: tuple[str, ...]
    limit: float


class Results:
    """The rows of one folder. A row has `part`, `case`, and either measured values or `error`."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        lines = (folder / ROWS).read_text().splitlines() if (folder / ROWS).exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def add(self, row: Row) -> None:
        """Write one row at once."""
        self.rows.append(row)
        with (self.folder / ROWS).open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def latest(self) -> dict[tuple[str, str], Row]:
        """Return one row for each case: the one with a result, or the last error."""
        found: dict[tuple[str, str], Row] = {}
        for row in self.rows:
            key = row["part"], row["case"]
            if key not in found or "error" in found[key]:
                found[key] = row
        return found


def plan(parts: Mapping[str, Any], results: Results) -> list[Work]:
    """Return the remaining cases: those that were not tried, by part, then those that failed."""
    latest = results.latest()
    untried, failed = [], []
    for name, part in parts.items():
        new = tuple(case for case in part.cases if (name, case) not in latest)
        again = tuple(case for case in part.cases if "error" in latest.get((name, case), ()))
        untried += [Work(name, new, part.limit)] if new else []
        failed += [Work(name, again, part.limit)] if again else []
    return untried + failed


def run(work: Work, results: Results, command: Sequence[str], until: float) -> None:
    """Measure cases in a process of their own, and write each row when it comes.

    command: the process; the part and its cases are added. It prints one row per line. until: time
    (`time.monotonic`) at which it is stopped even before its limit; the case in progress then
    counts as not tried
    """
    ends = time.monotonic() + work.limit
    left = list(work.cases)
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [*command, work.part, *work.cases],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,
        )
        try:
            for line in lines(process, min(ends, until)):
                row = json.loads(line)
                left.remove(row["case"])
                results.add({"part": work.part, **row})
                print(f"{work.part}, {row['case']}: {row.get('error', 'measured')}", flush=True)
        finally:
            stopped = process.poll() is None and bool(left)
            stop(process)
        if not left or (stopped and until <= ends):
            return
        errors.seek(0)
        last = next(iter(reversed(errors.read().strip().splitlines())), "")
        why = f"stopped after {work.limit:.0f} s" if stopped else f"the process ended: {last[:300]}"
        results.add({"part": work.part, "case": left[0], "error": why})
        print(f"{work.part}, {left[0]}: {why}", flush=True)


def lines(process: subprocess.Popen[str], until: float) -> Iterator[str]:
    """Yield the lines that a process prints, until it ends or the time `until` is reached."""
    assert process.stdout is not None
    descriptor, held = process.stdout.fileno(), b""
    while select.select([descriptor], [], [], max(0.0, until - time.monotonic()))[0]:
        fresh = os.read(descriptor, 1 << 16)
        *whole, held = (held + fresh).split(b"\n")
        yield from (line.decode() for line in whole)
        if not fresh:
            process.wait(timeout=60)
            return


def stop(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def work_on(part: str, cases: Sequence[str], tiny: bool) -> None:
    """Measure cases in this process, and print each row; nothing else goes to stdout."""
    out, sys.stdout = sys.stdout, sys.stderr
    from on_device import measure

    for case in cases:
        start = time.perf_counter()
        try:
            row = measure(part, case, tiny)
        except Exception as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            row = {"error": f"{type(error).__name__}: {first[:300]}"}
        row |= {"case": case, "took": round(time.perf_counter() - start, 1)}
        print(json.dumps(row), file=out, flush=True)


def machine() -> dict[str, str]:
    """Return the device, the versions and the commit, as a process of its own reports them: this
    one must hold no memory of the device."""
    script = (
        "import jax, json; from mukv.core.version import VERSION as own; "
        "kind = jax.devices()[0].device_kind; "
        "print(json.dumps({'device': kind, 'jax': jax.__version__, 'mukv': own}))"
    )
    quiet = {"capture_output": True, "text": True}
    told = subprocess.run([sys.executable, "-c", script], check=True, **quiet)
    head = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    commit = subprocess.run(head, check=False, **quiet)
    found = json.loads(told.stdout.splitlines()[-1])
    return {**found, "commit": commit.stdout.strip() or "unknown"}


def slug(name: str) -> str:
    """Return a name as part of a path, such as "nvidia-h100-80gb-hbm3"."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


# The table


def milliseconds(key: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else f"{1e3 * row[key]:.3g}"


def number(key: str, form: str) -> Callable[[Row], str]:
    return lambda row: "" if row.get(key) is None else format(row[key], form)


def errors_of(row: Row) -> str:
    told = row.get("cores", {}).items()
    each = (f"{name} {one['output_error']:.0e}, {one['gradient_error']:.0e}" for name, one in told)
    return "; ".join(each) or f"{row['logit_error']:.0e}"


def kernels(row: Row) -> str:
    return f"{row['program']['kernels']:,}" if "program" in row else ""


COLUMNS: dict[str, dict[str, Callable[[Row], str]]] = {
    "parity": {
        "relative error of output, gradient": errors_of,
        "passed": lambda row: "yes" if row["passed"] else "no",
    },
    "train": {
        "rows": number("batch", ","),
        "tokens/s": number("tokens_per_second", ",.0f"),
        "ms": milliseconds("seconds"),
        "MFU": number("mfu", ".1%"),
        "least ms of products": milliseconds("least_seconds"),
        "of moved bytes": milliseconds("seconds_of_moved_bytes"),
        "kernels": kernels,
    },
    "decode": {
        "tokens/s": number("tokens_per_second", ",.0f"),
        "ms": milliseconds("seconds"),
        "of bandwidth": number("of_bandwidth", ".0%"),
        "least ms of read bytes": milliseconds("least_seconds"),
        "of moved bytes": milliseconds("seconds_of_moved_bytes"),
        "kernels": kernels,
    },
    "k-means": {"ms": milliseconds("seconds"), "iterations": number("iterations", ",")},
    "sweep": {
        "seconds": lambda row: ", ".join(f"{k} {v:.1f}" for k, v in row["seconds"].items()),
        "largest difference, nats": number("largest_difference", ".0e"),
    },
}
"""Columns of the table by the first word of a part."""


def table(results: Results, told: Mapping[str, str]) -> str:
    """Return all rows as Markdown."""
    shown = [", ".join(f"{name} {value}" for name, value in told.items()), ""]
    groups: dict[str, list[Row]] = {}
    for row in results.latest().values():
        groups.setdefault(row["part"].split()[0], []).append(row)
    for kind, rows in groups.items():
        columns = COLUMNS[kind]
        shown += [
            f"| {' | '.join(('part', 'case', *columns))} |",
            "|---" * (2 + len(columns)) + "|",
        ]
        for row in rows:
            cells = [row["part"], row["case"]]
            if "error" in row:
                cells += [row["error"].replace("|", "/"), *[""] * (len(columns) - 1)]
            else:
                cells += [cell(row) for cell in columns.values()]
            shown.append(f"| {' | '.join(cells)} |")
        shown.append("")
    return "\n".join(shown)


def main(words: Sequence[str] | None = None) -> int:
    assert __doc__
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--minutes", type=float, default=9.0)
    options.add_argument("--parts", help="names, separated by commas; default: all")
    options.add_argument("--out", type=Path, metavar="FOLDER", help="where rows are written")
    options.add_argument("--dry-run", action="store_true", help="tiny shapes")
    options.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    given = options.parse_args(words)
    if given.work:
        work_on(given.work[0], given.work[1:], given.dry_run)
        return 0
    until = time.monotonic() + 60 * given.minutes
    from on_device import PARTS

    wanted = given.parts.split(",") if given.parts else list(PARTS)
    for name in wanted:
        if name not in PARTS:
            options.error(f"--parts: {name!r}; allowed: {', '.join(PARTS)}")
    told = machine()
    name = f"{'dry-run-' * given.dry_run}{slug(told['device'])}-{date.today()}"
    results = Results(given.out or HERE / "results" / name)
    tiny = ["--dry-run"] if given.dry_run else []
    command = [sys.executable, __file__, *tiny, "--work"]
    for work in plan({name: PARTS[name] for name in wanted}, results):
        if until - time.monotonic() < LEAST:
            print("the time is over; the same command goes on", flush=True)
            break
        if given.dry_run:  # on a CPU, which may be busy
            work = replace(work, limit=10 * work.limit)
        run(work, results, command, until)
        (results.folder / TABLE).write_text(table(results, told))
    print(f"written: {results.folder}")
    return 0 if all("error" not in row for row in results.latest().values()) else 1


if __name__ == "__main__":
    sys.exit(main())
