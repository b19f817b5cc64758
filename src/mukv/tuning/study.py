"""A study that several processes and machines share, through Optuna and its database.

All points of a study are queued when it begins. A trial is one attempt to train a point. If a
process is killed, its points return to the queue: any worker that finds a trial without a recent
heartbeat marks it as failed and queues its point again. If a point has two trials, the older one
counts, so that no lock is needed.
"""

from __future__ import annotations

import json
import re
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
from sqlalchemy.exc import ArgumentError, DBAPIError

from mukv.core.errors import BadInput, unknown_name
from mukv.tuning.space import Space, grid, random

SAMPLERS = ("grid", "random", "tpe", "gp")
PRUNERS = {
    "none": optuna.pruners.NopPruner,
    "median": optuna.pruners.MedianPruner,
    "halving": optuna.pruners.SuccessiveHalvingPruner,
}
POINT, ALIVE, FACTS = "point", "alive", "sweep"
"""Names of attributes of a trial (its point; time of its last heartbeat) and of a study (its
facts)."""
ATTEMPTS = 6
AT_ONCE, ROUNDS = 16, 8
"""Maximum number of points that a worker takes at once, and minimum number of rounds of a sampler
that learns from earlier points."""
DONE = (TrialState.COMPLETE, TrialState.PRUNED)


@dataclass(frozen=True)
class Settings:
    """Settings of the search in a space.

    sampler: name of the sampler
    pruner: name of Optuna's pruner
    trials: number of points
    patience: seconds without a heartbeat after which a trial counts as killed
    """

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
        """Number of points that a worker takes at once; few for a sampler that learns from earlier
        points."""
        return min(AT_ONCE, max(1, self.trials // ROUNDS)) if self.learns else AT_ONCE

    @property
    def learns(self) -> bool:
        """Whether the sampler uses results of earlier points."""
        return self.sampler in ("tpe", "gp")

    def points(self, space: Space) -> list[dict[str, Any]]:
        """Return the points that are queued at the start; empty dicts if the sampler chooses their
        values later."""
        if self.sampler == "grid":
            return grid(space)
        if self.sampler == "random":
            return list(islice(random(space, self.seed), self.trials))
        return [{} for _ in range(self.trials)]


@dataclass
class Study:
    """A study in a database.

    storage: URL of the database
    facts: configuration of the study by name; a study with other facts is refused
    mine: this worker's running trials, by number
    """

    storage: str
    name: str
    space: Space
    settings: Settings
    facts: Mapping[str, Any]
    mine: dict[int, Trial] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Open or create the study. Raises BadInput for a database that can't be used, and for an
        existing study with other facts."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self.points = self.settings.points(self.space)
        try:
            self.study = self._joined()
        except ImportError as error:
            what = f"needs a package: {error}"
            if self.storage.startswith("postgresql"):
                what += "; for PostgreSQL pip install 'mukv[postgresql]'"
            raise BadInput("--storage", without_password(self.storage), what) from error
        except Exception as error:  # SQLAlchemy raises many types
            reason = str(error).splitlines()[0]
            raise BadInput(
                "--storage", without_password(self.storage), f"a database ({reason})"
            ) from error
        self._require_same()

    def _joined(self) -> optuna.Study:
        lite = self.storage.startswith("sqlite:")
        # Let writers of one SQLite file wait for each other.
        waiting = {"connect_args": {"timeout": 120}} if lite else {}
        for attempt in range(ATTEMPTS):
            try:
                storage = optuna.storages.RDBStorage(
                    with_driver(self.storage), engine_kwargs=waiting
                )
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
                # Of workers that start together and create the tables, all but one get an error.
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
                    f"the study {self.name} in {without_password(self.storage)} has "
                    f"{before.get(name, 'nothing')}; "
                    "give another folder with --out",
                )

    def _sampler(self, point: int) -> optuna.samplers.BaseSampler:
        seed = self.settings.seed + point
        # Number of random points before the sampler learns; Optuna's 10 would be most of a short
        # study.
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
        """Return the trial that counts of each point, in the order of points: the oldest that has
        not failed."""
        oldest: dict[int, FrozenTrial] = {}
        for trial in self.study.get_trials(deepcopy=False):
            point = trial.user_attrs.get(POINT)
            if trial.state != TrialState.FAIL and point is not None:
                oldest.setdefault(point, trial)
        return [oldest[point] for point in sorted(oldest)]

    def heal(self) -> None:
        """Queue every point that has no trial, or whose trial has had no heartbeat for
        `patience` seconds."""
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
        queued = {trial.user_attrs[POINT] for trial in self.trials()}
        for point, given in enumerate(self.points):
            if point not in queued:
                self.study.enqueue_trial(given or drawn.get(point, {}), user_attrs={POINT: point})

    def take(self, count: int) -> list[tuple[Trial, dict[str, Any]]]:
        """Take up to `count` points of the queue, each with a value for every key."""
        taken: list[tuple[Trial, dict[str, Any]]] = []
        while len(taken) < count and self._waiting():
            trial = self.study.ask()
            point = trial.user_attrs.get(POINT)
            if point is None or not any(each.number == trial.number for each in self.trials()):
                # Another worker was faster, and the point already has a trial; or the trial was not
                # queued here and has no point.
                self._fail(trial.number)
                continue
            self.mine[trial.number] = trial
            trial.set_user_attr(ALIVE, time.time())
            self.study.sampler = self._sampler(point)
            values = {name: part.suggest(trial, name) for name, part in self.space.items()}
            taken.append((trial, values))
        return taken

    def report(self, trial: Trial, value: float, step: int) -> bool:
        """Report the value of a running trial; return whether it should continue. It should not if
        it is pruned, or if another worker has taken over its point."""
        try:
            trial.report(value, step)
        except UpdateFinishedTrialError:
            return False
        return not trial.should_prune()

    def note(self, trial: Trial, name: str, value: Any) -> None:
        """Store an attribute of a trial. Does nothing if another worker has taken over
        its point."""
        with suppress(UpdateFinishedTrialError):
            trial.set_user_attr(name, value)

    def tell(self, trial: Trial, value: float | None, why: str | None = None) -> None:
        """End a trial with a value, or without one and with the reason. Does nothing if another
        worker has taken over its point."""
        try:
            if why is not None:
                trial.set_user_attr("reason", why)
            state = TrialState.COMPLETE if value is not None else TrialState.PRUNED
            self.study.tell(trial, value, state=state, skip_if_finished=True)
        except UpdateFinishedTrialError:
            pass
        self.mine.pop(trial.number, None)

    def give_back(self, trial: Trial) -> None:
        """Fail a trial, so that its point is queued again."""
        self._fail(trial.number)

    def finished(self) -> bool:
        """Whether all points have a completed or pruned trial."""
        trials = self.trials()
        return len(trials) >= len(self.points) and all(trial.state in DONE for trial in trials)

    @contextmanager
    def alive(self) -> Iterator[None]:
        """Send heartbeats of this worker's trials from a thread while the block runs. At the end,
        unfinished points return to the queue."""
        over = threading.Event()

        def beat() -> None:
            while not over.wait(self.settings.patience / 4):
                for trial in list(self.mine.values()):
                    try:
                        trial.set_user_attr(ALIVE, time.time())
                    except Exception:  # just finished, or the database is temporarily unavailable
                        continue

        thread = threading.Thread(target=beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            for number in list(self.mine):
                # Return unfinished points to the queue.
                self._fail(number)

    def _waiting(self) -> Sequence[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))

    def _fail(self, number: int) -> None:
        self.mine.pop(number, None)
        with suppress(UpdateFinishedTrialError):  # ended by another worker in the meantime
            self.study.tell(number, state=TrialState.FAIL, skip_if_finished=True)


def _lock_from_first_read(engine: Engine) -> None:
    """Make transactions lock an SQLite file from their first read.

    Python's driver locks it at the first write, so that two workers that read the same waiting
    trial would both take it.
    """

    @event.listens_for(engine, "connect")
    def disable_implicit_begin(connection: Any, _: Any) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    engine.dispose()  # close connections made before


def with_driver(storage: str) -> str:
    """Return the URL of a database, with the driver psycopg 3 for "postgresql://".

    The driver that SQLAlchemy takes by default is psycopg2 before version 2.1; `mukv[postgresql]`
    installs psycopg 3.
    """
    scheme, separator, rest = storage.partition("://")
    return f"postgresql+psycopg://{rest}" if separator and scheme == "postgresql" else storage


def without_password(storage: str) -> str:
    """Return the URL of a database with its password replaced by "***"."""
    try:
        return make_url(storage).render_as_string(hide_password=True)
    except ArgumentError:  # no URL; what stands between ":" and "@" may still be a password
        return re.sub(r":[^:@/]*@", ":***@", storage)


def storage_of(folder: Path) -> str:
    """Return the URL of the database of a study in a folder. Raises BadInput for a path that can't
    be written as a URL."""
    path = str(folder.absolute() / "study.db")
    url = URL.create("sqlite", database=path).render_as_string(hide_password=False)
    if make_url(url).database != path:  # SQLAlchemy before 2.1 reads text after a "?" as options
        raise BadInput("--out", str(folder), "a path that can be part of a URL")
    return url
