"""Log a run's metrics: always to metrics.jsonl, optionally to trackers.

Each record is one line of JSON, appended and flushed at once. A tracker is a class with `log` and
`close`; to add one, write a class and add a line to the table. The packages of trackers are
optional extras.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mukv.core.counts import INT32
from mukv.core.errors import BadInput, unknown_name
from mukv.core.table import imported
from mukv.storage.files import write_atomic
from mukv.storage.json_text import to_json

LONGEST_LINE, MOST_STEPS = 1 << 20, INT32
"""Longest line in characters, and largest step, that are accepted in a metrics file."""
SkippedLine = Callable[[int, str], None]
"""Callback that receives the number of an ignored line, and the reason."""


class Tracker(Protocol):
    """A destination of metrics."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl: one object per line, with the step."""

    def __init__(self, path: Path, keep_until: int | None = None):
        """Open the file for appending.

        keep_until: records after this step, which a run logged before it was resumed from this
            step, are deleted; None keeps all
        """
        if path.exists():
            kept = [r for r in read_metrics(path) if keep_until is None or r["step"] <= keep_until]
            write_atomic(path, "".join(to_json(record) + "\n" for record in kept))
        self.file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(to_json({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path, left_out: SkippedLine | None = None) -> Iterator[dict[str, Any]]:
    """Yield the records of a metrics file: the step (32 bits) and all values that are finite
    numbers.

    Everything else is skipped, such as a last line that a kill cut short, or text in place of a
    loss.

    left_out: called with the number of a skipped line and the reason
    """
    tell = left_out or (lambda number, why: None)
    if not path.is_file():
        if path.exists():
            tell(0, "not a regular file")
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        number, whole = 0, True
        while line := file.readline(LONGEST_LINE):
            began, whole = whole, line.endswith("\n")
            number += began
            if not began or not line.strip():
                continue
            if not whole and len(line) >= LONGEST_LINE:
                tell(number, "a line that is too long")
                continue
            record = _parsed(line)
            if record is None:
                tell(number, "not an object with a step")
                continue
            numbers = {key: value for key, value in record.items() if _is_finite(value)}
            for key in record.keys() - numbers.keys():
                tell(number, f"{key[:40]} is not a finite number")
            yield numbers


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # ValueError also for a number of 5,000 digits
        return None
    fits = isinstance(record, dict) and type(record.get("step")) is int
    return record if fits and 0 <= record["step"] <= MOST_STEPS else None


def _is_finite(value: Any) -> bool:
    try:
        return type(value) in (int, float) and math.isfinite(value)
    except OverflowError:
        return False


class TensorBoard:
    """Scalars for TensorBoard, through tensorboardX (extra `tensorboard`)."""

    package = "tensorboardX"

    def __init__(self, folder: Path, name: str):
        self.writer = import_module(self.package).SummaryWriter(str(folder))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A Weights & Biases run (extra `wandb`)."""

    package = "wandb"

    def __init__(self, folder: Path, name: str):
        self.run = import_module(self.package).init(
            project="mukv", name=name, id=name, dir=str(folder), resume="allow"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def close(self) -> None:
        self.run.finish()


TRACKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def require(names: Iterable[str]) -> None:
    """Raise BadInput for a tracker that is not in the table or whose package is missing."""
    for name in names:
        if name not in TRACKERS and "." in name:
            TRACKERS[name] = imported(name, "train.trackers")
        if name not in TRACKERS:
            raise unknown_name("train.trackers", name, TRACKERS)
        try:
            if package := getattr(TRACKERS[name], "package", None):
                import_module(package)
        except ImportError:
            allowed = f"needs an extra: pip install 'mukv[{name}]'"
            raise BadInput("train.trackers", name, allowed) from None


class Trackers:
    """The metrics file and the chosen trackers."""

    def __init__(
        self, folder: Path, names: Sequence[str], keep_until: int | None, silent: bool = False
    ):
        """Open the metrics file and the trackers.

        silent: log nothing, for all processes of a run except process 0
        """
        require(names)
        self.all: list[Tracker] = []
        if silent:
            return
        others = [TRACKERS[name](folder / name, folder.name) for name in names]
        self.all = [MetricsFile(folder / "metrics.jsonl", keep_until), *others]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the finite values; JSON can't represent others."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for tracker in self.all:
            tracker.log(step, finite)

    def close(self) -> None:
        for tracker in self.all:
            tracker.close()
