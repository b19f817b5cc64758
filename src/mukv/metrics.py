"""Where the numbers of a run go: always to metrics.jsonl, on demand to a tracker.

One line of JSON per record, appended and flushed at once. A tracker is a class with `log` and
`close`; to add one: a class, a line in the table. Their packages are optional extras.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mukv.core.errors import BadInput, unknown_name
from mukv.core.files import write_atomic


class Tracker(Protocol):
    """Something that keeps numbers."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl: one object per line, with the step."""

    def __init__(self, path: Path, keep_until: int | None = None):
        """keep_until: a resumed run forgets what an earlier one logged beyond this step."""
        if path.exists():
            kept = [r for r in read_metrics(path) if keep_until is None or r["step"] <= keep_until]
            write_atomic(path, "".join(json.dumps(record) + "\n" for record in kept))
        self.file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def close(self) -> None:
        self.file.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics file; a last line that a kill cut short is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            yield record


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


TRACKERS = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def require(names: Iterable[str]) -> None:
    """Raise BadInput for a tracker that is not in the table, or whose package is missing."""
    for name in names:
        if name not in TRACKERS:
            raise unknown_name("train.trackers", name, TRACKERS)
        try:
            import_module(TRACKERS[name].package)
        except ImportError:
            allowed = f"needs an extra: pip install 'mukv[{name}]'"
            raise BadInput("train.trackers", name, allowed) from None


class Trackers:
    """All of them at once."""

    def __init__(
        self, folder: Path, names: Sequence[str], keep_until: int | None, silent: bool = False
    ):
        """silent: log nothing, as all processes of a run do but the first."""
        require(names)
        self.all: list[Tracker] = []
        if silent:
            return
        others = [TRACKERS[name](folder / name, folder.name) for name in names]
        self.all = [MetricsFile(folder / "metrics.jsonl", keep_until), *others]

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """What is not finite is left out: JSON has no word for it."""
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for tracker in self.all:
            tracker.log(step, finite)

    def close(self) -> None:
        for tracker in self.all:
            tracker.close()
