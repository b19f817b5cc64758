"""A sweep: trials of a study, each a run directory, until the study is finished.

A worker takes some points of the queue and trains those that differ only in numbers together.
Any number of workers may share a study; one that is killed loses what it had in hand, to those
that are left or to the next that joins.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from optuna.trial import Trial, TrialState

from mukv import config, runs
from mukv.config import Run
from mukv.core import schema
from mukv.core.errors import BadInput
from mukv.core.files import write_atomic
from mukv.core.locks import Held, one_writer
from mukv.core.numbers import leaves
from mukv.core.weights import save_weights
from mukv.data.tokens import TokenFile
from mukv.figures import saved_figure
from mukv.metrics import Trackers
from mukv.runs import RunDirectory
from mukv.search.space import Interval, Space, corners
from mukv.search.study import Settings, Study, storage_of
from mukv.search.together import Point, Together, free_memory, grouped

POLL_SECONDS = 1.0
OBJECTIVE = "validation_loss"


@dataclass
class Sweep:
    """source, overrides: as of `mukv train`. together: points that a worker takes at a
    time; None for the settings' own number. memory: bytes that a program may take; None for
    `free_memory`."""

    source: str
    overrides: Sequence[str]
    space: Space
    settings: Settings
    folder: Path
    storage: str | None = None
    together: int | None = None
    memory: int | None = None
    held: ExitStack = field(default_factory=ExitStack)
    locks: dict[int, ExitStack] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises BadInput where a point of the space makes no run, before any is trained."""
        if self.together is not None and self.together < 1:
            raise BadInput("--together", self.together, "at least 1")
        self.base = config.load(self.source, self.overrides)
        points = self.settings.points(self.space)
        for point in points if points[0] else corners(self.space):
            self.run_of(point)
        self.tokens: TokenFile = runs.open_corpus(self.base)
        data = replace(self.base.data, path=str(self.tokens.path.resolve()))
        facts = leaves(schema.to_mapping(replace(self.base, data=data)))
        searched = {f"range of {name}": str(part) for name, part in self.space.items()}
        chosen = {"--sampler": self.settings.sampler, "--seed": self.settings.seed}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.study = Study(
            self.storage or storage_of(self.folder),
            self.folder.name,
            self.space,
            self.settings,
            {**facts, **searched, **chosen, "data": self.tokens.fingerprint},
        )

    def run_of(self, point: Mapping[str, Any]) -> Run:
        given = [f"{name}={json.dumps(value)}" for name, value in point.items()]
        return config.load(self.source, [*self.overrides, *given])

    def work(self) -> None:
        """Until every point of the study is done, by whomever."""
        with self.study.alive():
            while True:
                self.study.heal()
                taken = self.study.take(self.together or self.settings.at_once)
                if taken:
                    with ExitStack() as self.held:
                        self._train([each for each in taken if self._hold(each[0])])
                elif self.study.finished():
                    break
                else:
                    time.sleep(POLL_SECONDS)
        write_atomic(self.folder / "results.json", json.dumps(self.results(), indent=2) + "\n")
        self.draw()

    def _hold(self, trial: Trial) -> bool:
        """Whether its run directory is ours to write now. It is not where one that was taken for
        dead lives on: its point is given back, and queued again when it has shown no life."""
        lock = self.held.enter_context(ExitStack())
        try:
            lock.enter_context(one_writer(self._folder(trial).path))
        except Held:
            time.sleep(POLL_SECONDS)
            self.study.give_back(trial)
            return False
        self.locks[trial.number] = lock
        return True

    def _tell(self, trial: Trial, value: float | None, why: str | None = None) -> None:
        """How a trial ended; its lock goes before, since nobody comes back to it after."""
        self.locks.pop(trial.number).close()
        self.study.tell(trial, value, why)

    def _train(self, taken: Sequence[tuple[Trial, dict[str, Any]]]) -> None:
        ready: list[tuple[Trial, Run]] = []
        for trial, values in taken:
            try:
                run = self.run_of(values)
                data = replace(run.data, path=str(self.tokens.path.resolve()))
                ready.append((trial, replace(run, data=data)))
            except BadInput as error:
                self._tell(trial, None, str(error))
        points = [Point(run.model, run.train) for _, run in ready]
        budget = self.memory if self.memory is not None else free_memory()
        for indices in grouped(points):
            first = ready[indices[0]][1]
            chosen = [points[index] for index in indices]
            whole = Together(chosen, self.tokens, first.data.packing)
            members = iter(ready[index] for index in indices)
            for part in whole.fitting(budget):
                self._train_group(part, [next(members) for _ in part.points])

    def _train_group(self, group: Together, members: Sequence[tuple[Trial, Run]]) -> None:
        folders = [self._folder(trial) for trial, _ in members]
        trackers: list[Trackers] = []
        for (_, run), folder in zip(members, folders, strict=True):
            runs.describe_run(run, folder, self.tokens)
            # A trial that was killed begins anew.
            trackers.append(Trackers(folder.path, run.train.trackers, keep_until=0))
        last: list[float | None] = [None] * len(members)
        for report in group.run(f"{self.folder.name}: {len(members)} of {len(self.study.points)}"):
            for index, (trial, _) in enumerate(members):
                if index in group.stopped:
                    continue
                numbers = report.numbers[index]
                trackers[index].log(report.step, numbers)
                if not math.isfinite(numbers["loss"]):
                    self._tell(trial, None, f"diverged by step {report.step}")
                    group.stopped.add(index)
                elif OBJECTIVE in numbers:
                    last[index] = numbers[OBJECTIVE]
                    on = self.study.report(trial, numbers[OBJECTIVE], report.step)
                    if report.step < group.training.steps and not on:
                        self._tell(trial, None, f"pruned at step {report.step}")
                        group.stopped.add(index)
        for index, (trial, _) in enumerate(members):
            trackers[index].close()
            if index not in group.stopped:
                save_weights(folders[index].weights, group.weights(index), {})
                self._tell(trial, last[index])

    def _folder(self, trial: Trial) -> RunDirectory:
        return RunDirectory(self.folder / "trials" / f"{trial.user_attrs['point']:04d}")

    # What came of it

    def results(self) -> dict[str, Any]:
        """The rows of all trials, best first."""
        rows: list[dict[str, Any]] = []
        for trial in self.study.trials():
            point = trial.user_attrs["point"]
            row = {"run": str(self.folder / "trials" / f"{point:04d}"), **trial.params}
            complete = trial.state == TrialState.COMPLETE
            row |= {OBJECTIVE: trial.value if complete else None, "state": trial.state.name.lower()}
            row["reason"] = trial.user_attrs.get("reason")
            rows.append(row)
        rows.sort(key=lambda row: math.inf if row[OBJECTIVE] is None else row[OBJECTIVE])
        best = rows[0] if rows and rows[0][OBJECTIVE] is not None else None
        return {
            "study": str(self.folder),
            "storage": self.study.storage,
            "trials": len(rows),
            "complete": sum(row["state"] == TrialState.COMPLETE.name.lower() for row in rows),
            "best": best,
            "rows": rows,
        }

    def draw(self) -> None:
        """The objective against everything that was searched."""
        rows = [row for row in self.results()["rows"] if row[OBJECTIVE] is not None]
        if not rows:
            return
        size = (3.4 * len(self.space), 3.4)
        with saved_figure(self.folder / "sweep.png", size) as figure:
            panels = figure.subplots(1, len(self.space), squeeze=False, sharey=True)[0]
            for axes, (name, part) in zip(panels, self.space.items(), strict=True):
                x = [row[name] for row in rows]
                numeric = all(isinstance(value, int | float) for value in x)
                axes.plot(x if numeric else list(map(str, x)), [r[OBJECTIVE] for r in rows], "o")
                axes.plot(x[:1] if numeric else [str(x[0])], [rows[0][OBJECTIVE]], "*", ms=14)
                if (isinstance(part, Interval) and part.log) or _spread(x, numeric):
                    axes.set_xscale("log")
                axes.set(xlabel=name)
                axes.grid(alpha=0.3)
            panels[0].set_ylabel("validation loss, nats per token")


def _spread(values: Sequence[Any], numeric: bool) -> bool:
    return numeric and min(values) > 0 and max(values) / min(values) > 20
