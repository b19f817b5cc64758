"""A study that several processes and machines share, over Optuna and its database.

All points of a study are put into the queue when it begins; one that is killed gives its point
back: whoever notices that a trial has shown no life for a while fails it and queues the point
again. Of two trials of one point the older counts, so that nothing needs a lock.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy import URL, Engine, event, make_url
from sqlalchemy.exc import DBAPIError

from mukv.core.errors import BadInput, unknown_name
from mukv.tuning.space import Space, grid, random

SAMPLERS = ("grid", "random", "tpe", "gp")
PRUNERS = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "halving": optuna.pruners.SuccessiveHalvingPruner,
}
POINT, ALIVE, FACTS = "point", "alive", "sweep"
"""Names of what is kept with a trial (the point that it tries; when it last showed life) and with
a study (what it is of)."""
ATTEMPTS = 6
AT_ONCE, ROUNDS = 16, 8
"""Points that a worker takes at a time; of a sampler that learns, in how many rounds at least."""
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Settings:
    """How a space is searched. patience: seconds without life after which a trial counts as
    killed."""

    sampler: str = "random"
    pruner: str = "none"
    trials: int = 16
    seed: int = 0
    patience: float = 60.0

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise unknown_name("--sampler", self.sampler, SAMPLERS)
        if self.pruner not in PRUNERS:
            raise unknown_name("--pruner", self.pruner, PRUNERS)
        if self.trials < 1:
            raise BadInput("--trials", self.trials, "at least 1")
        if self.patience <= 0:
            raise BadInput("--patience", self.patience, "more than 0 seconds")

    @property
    def at_once(self) -> int:
        """Points that a worker takes from the queue at a time: few of a sampler that learns from
        what came of those before."""
        return min(AT_ONCE, max(1, self.trials // ROUNDS)) if self.learns else AT_ONCE

    @property
    def learns(self) -> bool:
        return self.sampler in ("tpe", "gp")

    def points(self, space: Space) -> list[dict[str, Any]]:
        """What the queue begins with; nothing of a point that is left to the sampler."""
        if self.sampler == "grid":
            return grid(space)
        if self.sampler == "random":
            return list(islice(random(space, self.seed), self.trials))
        return [{} for _ in range(self.trials)]


@dataclass
class Study:
    """facts: what the study is of, by name; a study of other facts is refused."""

    storage: str
    name: str
    space: Space
    settings: Settings
    facts: Mapping[str, Any]
    mine: dict[int, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raises BadInput for a database that can't be used, or a study of something else."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.points = self.settings.points(self.space)
        try:
            self.study = self._joined()
        except ImportError as error:
            raise BadInput("--storage", self.storage, f"needs a package: {error}") from error
        except Exception as error:  # SQLAlchemy's many
            reason = str(error).splitlines()[0]
            raise BadInput("--storage", self.storage, f"a database ({reason})") from error
        self._require_same()

    def _joined(self) -> optuna.Study:
        lite = self.storage.startswith("sqlite:")
        # Writers of one file wait for each other.
        waiting = {"connect_args": {"timeout": 120}} if lite else {}
        for attempt in range(ATTEMPTS):
            try:
                storage = optuna.storages.RDBStorage(self.storage, engine_kwargs=waiting)
                if lite:
                    _lock_from_first_read(storage.engine)
                return optuna.create_study(
                    storage=storage,
                    study_name=self.name,
                    sampler=self._sampler(0),
                    pruner=PRUNERS[self.settings.pruner](),
                    load_if_exists=True,
                )
            except DBAPIError:
                # Workers that begin together all create the tables; all but one are refused.
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.2 * 2**attempt)
        raise AssertionError

    def _require_same(self) -> None:
        now = json.loads(json.dumps(self.facts, default=str))
        before = self.study.user_attrs.get(FACTS)
        if before is None:
            self.study.set_user_attr(FACTS, now)
            return
        for name in {**now, **before}:
            if now.get(name) != before.get(name):
                raise BadInput(
                    name,
                    now.get(name, "nothing"),
                    f"the study {self.name} in {self.storage} has {before.get(name, 'nothing')}; "
                    "give another folder with --out",
                )

    def _sampler(self, point: int) -> optuna.samplers.BaseSampler:
        seed = self.settings.seed + point
        # Drawn at random before the sampler has something to learn from; Optuna's 10 would be
        # most of a short study.
        first = min(10, max(2, self.settings.trials // 3))
        if self.settings.sampler == "tpe":
            return optuna.samplers.TPESampler(n_startup_trials=first, seed=seed)
        if self.settings.sampler == "gp":
            if not all(map(find_spec, ("scipy", "torch"))):
                raise BadInput("--sampler", "gp", "needs an extra: pip install 'mukv[gp]'")
            return optuna.samplers.GPSampler(n_startup_trials=first, seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)

    # The queue

    def trials(self) -> list[FrozenTrial]:
        """Those that count: the oldest of each point that has not failed, by point."""
        found: dict[int, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            point = trial.user_attrs.get(POINT)
            if trial.state != TrialState.FAIL and point is not None:
                found.setdefault(point, trial)
        return [found[point] for point in sorted(found)]

    def heal(self) -> None:
        """Queue every point that has no trial, or whose trial shows no life."""
        now = time.time()
        drawn: dict[int, dict[str, Any]] = {}
        for trial in self.study.get_trials(deepcopy=False):
            point = trial.user_attrs.get(POINT)
            if trial.state == TrialState.RUNNING and trial.number not in self.mine:
                began = trial.datetime_start.timestamp() if trial.datetime_start else now
                if now - max(trial.user_attrs.get(ALIVE, 0), began) > self.settings.patience:
                    self._fail(trial.number)
            if trial.params and point is not None:
                drawn[point] = trial.params
        there = {trial.user_attrs[POINT] for trial in self.trials()}
        for point, given in enumerate(self.points):
            if point not in there:
                self.study.enqueue_trial(given or drawn.get(point, {}), user_attrs={POINT: point})

    def take(self, count: int) -> list[tuple[Trial, dict[str, Any]]]:
        """Up to `count` points of the queue, with a value for each key."""
        taken: list[tuple[Trial, dict[str, Any]]] = []
        while len(taken) < count and self._waiting():
            trial = self.study.ask()
            point = trial.user_attrs.get(POINT)
            if point is None or not any(each.number == trial.number for each in self.trials()):
                # Another was quicker: a trial of nothing, or of a point that has one.
                self._fail(trial.number)
                continue
            self.mine[trial.number] = trial
            trial.set_user_attr(ALIVE, time.time())
            self.study.sampler = self._sampler(point)
            values = {name: part.suggest(trial, name) for name, part in self.space.items()}
            taken.append((trial, values))
        return taken

    def report(self, trial: Trial, value: float, step: int) -> bool:
        """Tell of a trial in progress; whether it should go on: it may lag, or have been taken
        over by another who saw no life in it."""
        try:
            trial.report(value, step)
        except UpdateFinishedTrialError:
            return False
        return not trial.should_prune()

    def note(self, trial: Trial, name: str, value: Any) -> None:
        """Keep something with a trial. Nothing if another has taken it over."""
        with suppress(UpdateFinishedTrialError):
            trial.set_user_attr(name, value)

    def tell(self, trial: Trial, value: float | None, why: str | None = None) -> None:
        """How a trial ended: with a value, or with none and the reason. Nothing if another has
        taken it over."""
        try:
            if why is not None:
                trial.set_user_attr("reason", why)
            state = TrialState.COMPLETE if value is not None else TrialState.PRUNED
            self.study.tell(trial, value, state=state, skip_if_finished=True)
        except UpdateFinishedTrialError:
            pass
        self.mine.pop(trial.number, None)

    def give_back(self, trial: Trial) -> None:
        """Leave a point to be queued again."""
        self._fail(trial.number)

    def finished(self) -> bool:
        found = self.trials()
        return len(found) >= len(self.points) and all(trial.state in DONE for trial in found)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Shows life of the trials that are in hand, from a thread of its own."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self.settings.patience / 4):
                for trial in list(self.mine.values()):
                    try:
                        trial.set_user_attr(ALIVE, time.time())
                    except Exception:  # finished in this moment, or the database is away a while
                        continue

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            for number in list(self.mine):
                # Whoever leaves gives back what it has not done.
                self._fail(number)

    def _waiting(self) -> Sequence[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def _fail(self, number: int) -> None:
        self.mine.pop(number, None)
        with suppress(UpdateFinishedTrialError):  # by another, since Optuna looked
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _lock_from_first_read(engine: Engine) -> None:
    """Let a transaction hold an SQLite file from its first read. Python's driver begins with the
    first write: two workers that read the same waiting trial would both take it."""

    @event.listens_for(engine, "connect")
    def leave_to_us(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # of connections made before


def storage_of(folder: Path) -> str:
    """The database of a study in a folder, as a URL. Raises BadInput for a path that has none."""
    path = str(folder.absolute() / "study.db")
    url = URL.create("sqlite", database=path).render_as_string(hide_password=False)
    if make_url(url).database != path:  # SQLAlchemy before 2.1 takes what follows a "?" as options
        raise BadInput("--out", str(folder), "a path that can be part of a URL")
    return url
