"""A sweep's study loses or repeats no trial if a worker is killed."""

from __future__ import annotations

import json
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import optuna
import pytest
from optuna.trial import TrialState

import mukv as package
from mukv.core.errors import BadInput
from mukv.tuning.space import Choice, Interval
from mukv.tuning.study import Settings, Study, storage_of, with_driver, without_password
from tests.conftest import MINUSCULE
from tests.pairs import params
from tests.processes import finish, start
from tests.tuning.database import PASSWORD, postgresql

__all__ = ["postgresql"]

SPACE = {"x": Choice((1, 2, 3, 4))}


def study(folder, patience=60.0, sampler="grid", **facts):
    return Study(
        storage_of(folder), "s", SPACE, Settings(sampler, trials=4, patience=patience), facts
    )


def arguments(token_file, out, *more):
    return ["sweep", "tiny", *MINUSCULE, f"data.path={token_file}", "--out", out, *more]


def test_a_sweep(mukv, token_file, tmp_path):
    given = arguments(
        token_file, tmp_path / "s", "train.learning_rate=1e-3..1e-2:log:2", "train.seed=0,1"
    )
    done = mukv(*given, "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["trials"] == facts["complete"] == 4
    assert facts["best"] == min(facts["rows"], key=lambda row: row["validation_loss"])
    assert len(facts["rows"]) == 2
    for row in facts["rows"]:
        assert set(row["seeds"]) == {"0", "1"}
        low, high = sorted(row["seeds"].values())
        assert row["validation_loss"] == pytest.approx((low + high) / 2)
        assert row["deviation"] == pytest.approx((high - low) / 2**0.5)
        runs = sorted((tmp_path / "s" / "trials").glob(f"{row['run'][-11:-7]}-seed-*"))
        assert [str(run)[-1] for run in runs] == ["0", "1"]
    # The best of two values is at an end.
    assert facts["edges"] == ["train.learning_rate"]
    assert "train.learning_rate: the best value" in mukv(*given).stderr
    assert (tmp_path / "s" / "sweep.png").stat().st_size > 5_000
    trial = package.load(facts["best"]["run"])
    assert trial.network.d_model == 32
    # Nothing is left to do: the command ends at once with the same result.
    again = json.loads(mukv(*given, "--json").stdout.splitlines()[-1])
    assert again == facts
    other = mukv(*given, "train.steps=4")
    assert other.returncode == 2
    assert "train.steps: got 4; the study" in other.stderr


@pytest.mark.product
def test_each_point_trains_on_its_own_task(mukv, tmp_path):
    """Keys of the data can be searched; points with different data are not trained together."""
    task = ("data.task={kind: needle}", "data.task.filler=4,8")
    done = mukv("sweep", "tiny", *MINUSCULE, *task, "--out", tmp_path / "s", "--json")
    assert done.returncode == 0, done.stderr
    assert "programs to compile: 2" in done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert {package.load(row["run"]).run.data.task.filler for row in rows} == {4, 8}
    assert len({row["validation_loss"] for row in rows}) == 2


@pytest.mark.product
def test_a_sampler_is_not_asked_for_seeds(mukv, token_file, tmp_path):
    ranges = ("train.learning_rate=1e-3..1e-2:log", "train.seed=3..4")
    more = ("--sampler", "tpe", "--trials", 2, "--json")
    done = mukv(*arguments(token_file, tmp_path / "s", *ranges, *more))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert (facts["trials"], len(facts["rows"])) == (4, 2)
    assert all(set(row["seeds"]) == {"3", "4"} for row in facts["rows"])
    assert all("train.seed" not in row for row in facts["rows"])


@pytest.mark.product
def test_seeds_alone_are_a_point(mukv, token_file, tmp_path):
    done = mukv(*arguments(token_file, tmp_path / "s", "train.seed=0,1,2", "--json"))
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert len(facts["best"]["seeds"]) == 3
    assert facts["edges"] == []


@pytest.mark.product
@pytest.mark.parametrize("sampler", params(["random", "tpe"], ["tpe"]))
def test_samplers_and_pruning(mukv, token_file, tmp_path, sampler):
    more = ("train.evaluate_every=1", "train.learning_rate=1e-4..1e30:log", "--sampler", sampler)
    done = mukv(
        *arguments(
            token_file,
            tmp_path / "s",
            *more,
            "--trials",
            6,
            "--pruner",
            "median",
            "--together",
            3,
            "--json",
        )
    )
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["trials"] == 6
    assert facts["complete"] > 0
    for row in facts["rows"]:
        assert row["state"] == ("complete" if row["validation_loss"] is not None else "pruned")
        assert row["validation_loss"] is not None or row["reason"]


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
def test_the_point_of_a_killed_worker_is_done_again(tmp_path, sampler):
    one, two = study(tmp_path, sampler=sampler), study(tmp_path, patience=0.01, sampler=sampler)
    one.heal()
    two.heal()
    ((killed, values),) = one.take(1)
    time.sleep(0.05)
    two.heal()
    taken = dict(Counter())
    for trial, found in two.take(9):
        taken[trial.user_attrs["point"]] = found
        two.tell(trial, 0.0)
    assert sorted(taken) == [0, 1, 2, 3]
    assert taken[killed.user_attrs["point"]] == values
    assert two.finished()


def test_a_sampler_that_learns_is_asked_in_rounds(tmp_path):
    settings = Settings("tpe", trials=24)
    space = {"x": Interval(0.0, 1.0)}
    learning = Study(storage_of(tmp_path), "s", space, settings, {})
    learning.heal()
    losses = []
    while taken := learning.take(settings.at_once):
        for trial, values in taken:
            losses.append((values["x"] - 0.3) ** 2)
            learning.tell(trial, losses[-1])
    assert len(losses) == 24
    assert sum(losses[-8:]) < 0.3 * sum(losses[:8])
    assert [Settings(name, trials=24).at_once for name in ("grid", "gp")] == [16, 3]


def test_a_point_is_done_once_for_two_trials(tmp_path):
    one = study(tmp_path)
    one.heal()
    one.study.enqueue_trial({"x": 1}, user_attrs={"point": 0})
    assert len(one.take(9)) == 4
    states = Counter(trial.state for trial in one.study.get_trials())
    assert states == {TrialState.RUNNING: 4, TrialState.FAIL: 1}


def test_workers_at_once_never_take_the_same_point(tmp_path):
    space = {"x": Choice(tuple(range(16)))}
    workers = [Study(storage_of(tmp_path), "s", space, Settings("grid"), {}) for _ in range(4)]
    workers[0].heal()
    together = Barrier(len(workers))

    def work(worker):
        together.wait()
        return [t.user_attrs["point"] for _ in range(16) for t, _ in worker.take(1)]

    with ThreadPoolExecutor(len(workers)) as threads:
        taken = [point for points in threads.map(work, workers) for point in points]
    assert sorted(taken) == list(range(16))


def test_a_study_of_something_else_is_refused(tmp_path):
    study(tmp_path, steps=3)
    with pytest.raises(BadInput, match=r"steps: got 4; the study s in .* has 3"):
        study(tmp_path, steps=4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["train.learning_rate=1e-2..1e-3"], "did you mean 0.001..0.01"),
        (["train.learning_rat=1,2"], "learning_rate"),
        (["train.learning_rate=-1,1"], "train.learning_rate: got -1"),
        (["train.seed=0,1", "--sampler", "grud"], "grid"),
        (["train.seed=0,1", "--trials", 0, "--sampler", "tpe"], "--trials: got 0"),
        (["train.seed=0,1", "--storage", "nonsense"], "--storage: got 'nonsense'; a database"),
        (["train.steps=3"], "sweep: got"),
        (["train.seed=0,1", "--sampler", "random"], "a key to search besides the seeds"),
        (["train.seed=0..1000"], "at most 64 seeds"),
        (["train.seed=0.5,1"], "train.seed"),
    ],
)
def test_bad_input(mukv, token_file, tmp_path, given, message):
    done = mukv(*arguments(token_file, tmp_path / "s", *given))
    assert done.returncode == 2
    assert message in done.stderr


def test_initial_weights_of_another_model(mukv, token_file, trained, tmp_path):
    given = f"train.start={trained}", "model.d_model=64", "train.seed=0,1"
    done = mukv(*arguments(token_file, tmp_path / "s", *given))
    assert done.returncode == 2
    assert "embedding: got (264, 32); the configuration asks for (264, 64)" in done.stderr
    assert not (tmp_path / "s").exists()


@pytest.mark.product
def test_three_workers_of_which_one_is_killed(token_file, tmp_path):
    out = tmp_path / "s"
    given = arguments(
        token_file, out, "train.steps=40", "train.learning_rate=1e-3..1e-2:log:4",
        "--together", 1, "--patience", 30,
    )  # fmt: skip
    workers = [start(*given) for _ in range(3)]
    victim = workers[0]
    started = out / "trials"
    while len(list(started.glob("*/metrics.jsonl"))) < 3 and victim.poll() is None:
        time.sleep(0.02)
    victim.kill()
    victim.communicate()
    for worker in workers[1:]:
        status, _, error = finish(worker, 300)
        assert status == 0, error
    found = optuna.load_study(study_name="s", storage=storage_of(out)).get_trials()
    complete = Counter(t.user_attrs["point"] for t in found if t.state == TrialState.COMPLETE)
    assert complete == dict.fromkeys(range(4), 1)
    assert {t.state for t in found} <= {TrialState.COMPLETE, TrialState.FAIL}
    assert json.loads((out / "results.json").read_text())["complete"] == 4


@pytest.mark.product
def test_four_workers_on_postgresql_of_which_one_is_killed(token_file, tmp_path, postgresql):
    """Workers with folders of their own, as on several machines, share the points of a study."""
    folders = [tmp_path / str(index) / "s" for index in range(4)]
    given = (
        "train.steps=40", "train.learning_rate=1e-3..1e-2:log:8",
        "--together", 1, "--patience", 30, "--storage", postgresql,
    )  # fmt: skip
    workers = [start(*arguments(token_file, out, *given)) for out in folders]
    victim = workers[0]
    while not list(folders[0].glob("trials/*/metrics.jsonl")) and victim.poll() is None:
        time.sleep(0.02)
    assert victim.poll() is None, victim.communicate()[1]
    victim.kill()
    victim.communicate()
    shown = ""
    for worker in workers[1:]:
        status, out, error = finish(worker, 300)
        assert status == 0, error
        shown += out + error
    found = optuna.load_study(study_name="s", storage=with_driver(postgresql)).get_trials()
    complete = Counter(t.user_attrs["point"] for t in found if t.state == TrialState.COMPLETE)
    assert complete == dict.fromkeys(range(8), 1)
    assert {t.state for t in found} <= {TrialState.COMPLETE, TrialState.FAIL}
    results = [json.loads((out / "results.json").read_text()) for out in folders[1:]]
    assert [each["complete"] for each in results] == [8] * 3
    losses = [[row["validation_loss"] for row in each["rows"]] for each in results]
    assert losses[0] == losses[1] == losses[2]
    files = (path for path in tmp_path.rglob("*") if path.is_file())
    assert not [path for path in files if PASSWORD.encode() in path.read_bytes()]
    assert PASSWORD not in shown


@pytest.mark.product
def test_a_postgresql_database_that_refuses(mukv, token_file, tmp_path, postgresql):
    wrong = postgresql.replace(PASSWORD, f"not-{PASSWORD}")
    done = mukv(
        *arguments(token_file, tmp_path / "s", "train.learning_rate=1e-3..1e-2:log:2"),
        "--storage", wrong,
    )  # fmt: skip
    assert done.returncode == 2
    assert "--storage: got 'postgresql://mukv:***@127.0.0.1" in done.stderr
    assert "password authentication failed" in done.stderr
    assert PASSWORD not in done.stderr + done.stdout


def test_passwords_of_databases_are_not_shown():
    given = "postgresql+psycopg://user:hidden@host/studies"
    assert without_password(given) == "postgresql+psycopg://user:***@host/studies"
    assert "hidden" not in without_password("postgresql//user:hidden@host")
    assert without_password("sqlite:////data/study.db") == "sqlite:////data/study.db"
