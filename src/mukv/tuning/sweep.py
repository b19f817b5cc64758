"""A sweep: run trials of a study until the study is finished.

A trial trains one point of the search space with each seed, in one run directory per seed; its
value is the mean over the seeds. A worker takes some points from the queue and trains those that
differ only in numbers together, in one program. Any number of workers may share a study; the points
of a killed worker return to the queue.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
from optuna.trial import FrozenTrial, Trial, TrialState

from mukv.core.errors import BadInput
from mukv.core.mesh import MeshShape
from mukv.data.feed import Feed
from mukv.runs import config
from mukv.runs.config import Data, Run
from mukv.runs.folder import RunDirectory
from mukv.runs.resolve import open_feed
from mukv.runs.start import check_start, checksums, find_base, find_start, with_base, write_base
from mukv.runs.train import describe_run
from mukv.schema import schema
from mukv.schema.numbers import leaves
from mukv.show.figures import saved_figure
from mukv.show.progress import say
from mukv.storage.files import write_atomic
from mukv.storage.json_text import to_json
from mukv.storage.locks import Held, one_writer
from mukv.storage.weights import save_weights
from mukv.train.metrics import Trackers
from mukv.tuning.space import SEED, Interval, Space, at_edge, corners, without_seeds
from mukv.tuning.study import Settings, Study, storage_of, without_password
from mukv.tuning.together import Point, Together, free_memory, grouped

POLL_SECONDS = 1.0
OBJECTIVE = "validation_loss"
LOSSES = "losses"
"""Attribute of a trial with the objective by seed."""


@dataclass
class Pending:
    """A trial that this worker is training.

    losses: latest objective by seed
    why: reason why the trial ended early; None if it did not
    """

    trial: Trial
    losses: dict[int, float] = field(default_factory=dict)
    why: str | None = None


class Member(NamedTuple):
    """One seed of a pending trial.

    feed: the data of its run
    """

    pending: Pending
    seed: int
    run: Run
    feed: Feed


def _by_data(members: Iterable[Member]) -> list[list[Member]]:
    """Group members by the data of their runs."""
    groups: dict[str, list[Member]] = {}
    for member in members:
        groups.setdefault(repr(member.run.data), []).append(member)
    return list(groups.values())


@dataclass
class Sweep:
    """A worker of a sweep.

    source, overrides: configuration as in `mukv train`
    together: number of points that the worker takes at once; None for the number in `settings`
    memory: bytes of device memory that a program may take; None for `free_memory`
    feeds: data of runs, with its resolved configuration, by configuration
    held, locks: locks on the run directories of the current trials, of all and by trial
    """

    source: str
    overrides: Sequence[str]
    space: Space
    settings: Settings
    folder: Path
    storage: str | None = None
    together: int | None = None
    memory: int | None = None
    feeds: dict[str, tuple[Data, Feed]] = field(default_factory=dict)
    held: ExitStack = field(default_factory=ExitStack)
    locks: dict[int, ExitStack] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open the study. Raises BadInput if a point of the space is not a valid run, before any is
        trained."""
        if self.together is not None and self.together < 1:
            raise BadInput("--together", self.together, "at least 1")
        self.base = config.load(self.source, self.overrides)
        searched = self.space
        self.space, self.seeds = without_seeds(self.space, self.base.train.seed)
        if not self.space and self.settings.sampler != "grid":
            given = f"--sampler {self.settings.sampler}"
            raise BadInput(SEED, given, "a key to search besides the seeds")
        points = self.settings.points(self.space)
        for point in points if points[0] else corners(self.space):
            for seed in self.seeds:
                self.run_of(point, seed)
        base, feed = self._opened(self.base)
        facts = leaves(schema.to_mapping(base))
        ranges = {f"range of {name}": str(part) for name, part in searched.items()}
        chosen = {"--sampler": self.settings.sampler, "--seed": self.settings.seed}
        self.folder.mkdir(parents=True, exist_ok=True)
        self.study = Study(
            self.storage or storage_of(self.folder),
            self.folder.name,
            self.space,
            self.settings,
            {**facts, **ranges, **chosen, "data": feed.fingerprint},
        )

    def run_of(self, point: Mapping[str, Any], seed: int) -> Run:
        """Return the configuration of a point with a seed. Raises BadInput if it is not valid."""
        given = [f"{name}={json.dumps(value)}" for name, value in {**point, SEED: seed}.items()]
        run = config.load(self.source, [*self.overrides, *given])
        check_start(run)
        return with_base(run)

    def _opened(self, run: Run) -> tuple[Run, Feed]:
        """Open the data of a run, once for all runs with the same data; see `open_feed`."""
        name = repr(run.data)
        if name not in self.feeds:
            opened, feed = open_feed(run)
            self.feeds[name] = opened.data, feed
        data, feed = self.feeds[name]
        return replace(run, data=data), feed

    def work(self) -> None:
        """Train points until all points of the study are done, by any worker."""
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
        write_atomic(self.folder / "results.json", to_json(self.results(), indent=2) + "\n")
        self.draw()

    def _hold(self, trial: Trial) -> bool:
        """Lock a trial's run directories; return whether that succeeded.

        It fails if a process whose heartbeat stopped is still running. The point is then given
        back, and queued again.
        """
        lock = self.held.enter_context(ExitStack())
        try:
            for seed in self.seeds:
                lock.enter_context(one_writer(self._folder(trial, seed).path))
        except Held:
            lock.close()
            time.sleep(POLL_SECONDS)
            self.study.give_back(trial)
            return False
        self.locks[trial.number] = lock
        return True

    def _end(self, trial: Trial, value: float | None, why: str | None = None) -> None:
        """Release a trial's locks, and end it with a value or a reason."""
        self.locks.pop(trial.number).close()
        self.study.tell(trial, value, why)

    def _train(self, taken: Sequence[tuple[Trial, dict[str, Any]]]) -> None:
        ready: list[Member] = []
        for trial, values in taken:
            pending = Pending(trial)
            try:
                for seed in self.seeds:
                    run, feed = self._opened(self.run_of(values, seed))
                    ready.append(Member(pending, seed, run, feed))
            except BadInput as error:
                ready = [member for member in ready if member.pending is not pending]
                self._end(trial, None, str(error))
        groups = [
            [same[index] for index in indices]
            for same in _by_data(ready)
            for indices in grouped([Point(each.run.model, each.run.train) for each in same])
        ]
        say(
            f"{self.folder.name}: {len(taken)} of {len(self.study.points)} points, "
            f"{len(ready)} runs; programs to compile: {len(groups)}"
        )
        budget = self.memory if self.memory is not None else free_memory()
        for group in groups:
            points = [Point(each.run.model, each.run.train) for each in group]
            whole = Together(points, group[0].feed, start=starting_weights(group[0].run))
            members = iter(group)
            for part in whole.fitting(budget):
                self._train_group(part, [next(members) for _ in part.points])
        for pending in {member.pending.trial.number: member.pending for member in ready}.values():
            self._tell(pending)

    def _tell(self, pending: Pending) -> None:
        """End a trial with its value, the mean over its seeds, or with the reason of its
        early end."""
        if pending.why is not None:
            self._end(pending.trial, None, pending.why)
            return
        self.study.note(pending.trial, LOSSES, {str(s): v for s, v in pending.losses.items()})
        self._end(pending.trial, statistics.mean(pending.losses.values()))

    def _train_group(self, group: Together, members: Sequence[Member]) -> None:
        folders = [self._folder(each.pending.trial, each.seed) for each in members]
        base = None if group.frozen is None else checksums(group.frozen)
        trackers: list[Trackers] = []
        for member, folder in zip(members, folders, strict=True):
            describe_run(member.run, folder, member.feed)
            if base is not None:
                write_base(folder, str(member.run.train.start), base)
            # A killed trial starts again from step 0.
            trackers.append(Trackers(folder.path, member.run.train.trackers, keep_until=0))
        for report in group.run(f"{self.folder.name}: {len(members)} runs"):
            for index, (pending, seed, *_) in enumerate(members):
                if pending.why is not None:
                    group.stopped.add(index)
                    continue
                numbers = report.numbers[index]
                trackers[index].log(report.step, numbers)
                if not math.isfinite(numbers["loss"]):
                    of = f"seed {seed} " if len(self.seeds) > 1 else ""
                    pending.why = f"{of}diverged by step {report.step}"
                    group.stopped.add(index)
                elif OBJECTIVE in numbers:
                    pending.losses[seed] = numbers[OBJECTIVE]
            if report.step < group.training.steps and OBJECTIVE in report.numbers[0]:
                self._prune(members, report.step)
        for index, (pending, *_) in enumerate(members):
            trackers[index].close()
            if pending.why is None:
                save_weights(folders[index].weights, group.weights(index), {})

    def _prune(self, members: Sequence[Member], step: int) -> None:
        """Report trials whose seeds are all in this group to the study, and end those that it
        prunes."""
        present: dict[int, list[Member]] = {}
        for member in members:
            present.setdefault(member.pending.trial.number, []).append(member)
        for pending, *_ in (each[0] for each in present.values() if len(each) == len(self.seeds)):
            if pending.why is None and not self.study.report(
                pending.trial, statistics.mean(pending.losses.values()), step
            ):
                pending.why = f"pruned at step {step}"

    def _folder(self, trial: Trial | FrozenTrial, seed: int) -> RunDirectory:
        """Return the run directory of a trial and seed: trials/POINT if the sweep has one seed,
        else trials/POINT-seed-SEED."""
        name = f"{trial.user_attrs['point']:04d}"
        if len(self.seeds) > 1:
            name += f"-seed-{seed}"
        return RunDirectory(self.folder / "trials" / name)

    # Results

    def results(self) -> dict[str, Any]:
        """Return the rows of all points, best first; `trials` and `complete` count runs.

        A row has the searched keys, `validation_loss` (the mean over seeds), and `run`, the run
        directory of the best seed. With several seeds it also has `deviation`, the sample standard
        deviation over seeds, and `seeds`, the loss of each seed. `edges` are the keys whose best
        value is at an end of the searched range.
        """
        rows = [self._row(trial) for trial in self.study.trials()]
        rows.sort(key=lambda row: math.inf if row[OBJECTIVE] is None else row[OBJECTIVE])
        best = rows[0] if rows and rows[0][OBJECTIVE] is not None else None
        complete = sum(row["state"] == TrialState.COMPLETE.name.lower() for row in rows)
        edges = [name for name, part in self.space.items() if best and at_edge(part, best[name])]
        return {
            "study": str(self.folder),
            "storage": without_password(self.study.storage),
            "trials": len(rows) * len(self.seeds),
            "complete": complete * len(self.seeds),
            "best": best,
            "edges": edges,
            "rows": rows,
        }

    def _row(self, trial: FrozenTrial) -> dict[str, Any]:
        complete = trial.state == TrialState.COMPLETE
        losses = {int(seed): loss for seed, loss in trial.user_attrs.get(LOSSES, {}).items()}
        best = min(losses, key=losses.__getitem__) if losses else self.seeds[0]
        row = {"run": str(self._folder(trial, best).path), **trial.params}
        row[OBJECTIVE] = trial.value if complete else None
        if len(self.seeds) > 1:
            spread = statistics.stdev(losses.values()) if len(losses) > 1 else None
            row |= {"deviation": spread, "seeds": losses}
        return row | {"state": trial.state.name.lower(), "reason": trial.user_attrs.get("reason")}

    def draw(self) -> None:
        """Draw the objective against every searched key; bars are deviations over seeds."""
        rows = [row for row in self.results()["rows"] if row[OBJECTIVE] is not None]
        if not rows or not self.space:
            return
        y = [row[OBJECTIVE] for row in rows]
        bars = [row.get("deviation") or 0.0 for row in rows] if len(self.seeds) > 1 else None
        size = (3.4 * len(self.space), 3.4)
        with saved_figure(self.folder / "sweep.png", size) as figure:
            panels = figure.subplots(1, len(self.space), squeeze=False, sharey=True)[0]
            for axes, (name, part) in zip(panels, self.space.items(), strict=True):
                x = [row[name] for row in rows]
                numeric = all(isinstance(value, int | float) for value in x)
                shown = x if numeric else list(map(str, x))
                axes.errorbar(shown, y, bars, fmt="o", capsize=2)
                axes.plot(shown[:1], y[:1], "*", ms=14)
                if (isinstance(part, Interval) and part.log) or _spread(x, numeric):
                    axes.set_xscale("log")
                axes.set(xlabel=name)
                axes.grid(alpha=0.3)
            over = f",\nmean over {len(self.seeds)} seeds" if len(self.seeds) > 1 else ""
            panels[0].set_ylabel(f"validation loss, nats per token{over}")


def starting_weights(run: Run) -> Any:
    """Read the initial weights of a run, or the frozen weights under its adapters, from
    `train.start`; None if they are drawn."""
    if run.train.start is None:
        return None
    find = find_start if run.train.adapter is None else find_base
    weights = find(run.train.start).weights(run.model.params(), MeshShape().build())
    return jax.device_put(weights)


def _spread(values: Sequence[Any], numeric: bool) -> bool:
    return numeric and min(values) > 0 and max(values) / min(values) > 20
