"""A configuration on trial: trained on a task at one length, tested at that and longer ones.

Every learning rate has the same budget; the best is the one with most right answers on validation
samples at the length of training, over all seeds. Runs are run directories, so that an interrupted
trial goes on where it was.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mukv.bench.examine import Examination, ExamineSettings, examine
from mukv.bench.grading import effective_length
from mukv.cache import FULL
from mukv.core.errors import BadInput
from mukv.core.statistics import wilson
from mukv.runs import loaded
from mukv.runs.config import VOCABULARY_MULTIPLE, Data, Run
from mukv.runs.folder import RunDirectory
from mukv.runs.train import train_run
from mukv.tasks import AnyTask


@dataclass(frozen=True)
class Trial:
    """run: model and training; its data, vocabulary, length, rate and seed are replaced. lengths:
    of the test, the first is that of training. growing: facts grow with the length."""

    run: Run
    lengths: tuple[int, ...]
    rates: tuple[float, ...]
    seeds: int
    folder: Path
    settings: ExamineSettings
    growing: bool = False

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise BadInput("--seeds", self.seeds, "at least 1")

    def check(self, task: AnyTask) -> None:
        """Raise BadInput for what can't be trained or tested, before any work."""
        for length in self.lengths:
            self.at(task, length).check_length(length)
            context = self.run.model.context
            if context is not None and length > context:
                raise BadInput("--lengths", length, f"at most model.context ({context})")
        _ = self.runs(task)

    def at(self, task: AnyTask, length: int) -> AnyTask:
        """The task as it is tested at a length."""
        times = length // self.lengths[0]
        if not self.growing or times == 1:
            return task
        grown = replace(task, facts=task.facts * times)
        if grown.vocab_size != task.vocab_size:
            raise BadInput("--growing", task.kind, "a task whose words do not follow its facts")
        return grown

    def runs(self, task: AnyTask) -> dict[tuple[float, int], Run]:
        """By learning rate and seed."""
        vocab = -(-task.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        model = replace(self.run.model, vocab_size=vocab)
        found = {}
        for rate in self.rates:
            for number in range(self.seeds):
                training = replace(
                    self.run.train,
                    length=self.lengths[0],
                    learning_rate=rate,
                    seed=self.run.train.seed + number,
                )
                found[rate, number] = replace(
                    self.run, model=model, data=Data(task=task), train=training
                )
        return found

    def examine(self, name: str, task: AnyTask) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Rows by length, and everything that was seen."""
        models, validated = {}, {}
        only = replace(self.settings, free=0, policy=FULL)
        for (rate, number), run in self.runs(task).items():
            folder = RunDirectory(self.folder / "runs" / name / f"rate-{rate:g}-seed-{number}")
            outcome = train_run(run, folder, title=f"{name}, rate {rate:g}, seed {number}")
            outcome.require_finished(folder.path)
            model = loaded.load(folder.path)
            models[rate, number] = model
            found = examine(model, name, task, self.lengths[0], only, "validation")
            validated[rate, number] = found.row

        def quality(rate: float) -> tuple[float, float]:
            rows = [validated[rate, number] for number in range(self.seeds)]
            right = statistics.mean(row["exact_match"] for row in rows)
            return right, -statistics.mean(row["bits"] for row in rows)

        best = max(self.rates, key=quality)
        tested = {
            length: [
                examine(models[best, number], name, self.at(task, length), length, self.settings)
                for number in range(self.seeds)
            ]
            for length in self.lengths
        }
        rows = [summary(found, best) for found in tested.values()]
        mastered = effective_length(
            {row["length"]: row["exact_match"] for row in rows}, rows[0]["chance"]
        )
        rows = [{**row, "effective_length": mastered} for row in rows]
        seen = {
            "rates": [
                {"learning_rate": rate, "seed": number, **row}
                for (rate, number), row in validated.items()
            ],
            "seeds": [
                {"seed": number, **each.row, "every": each.answers}
                for found in tested.values()
                for number, each in enumerate(found)
            ],
        }
        return rows, seen


def summary(found: Sequence[Examination], rate: float) -> dict[str, Any]:
    """Means over seeds; the interval is of all their answers together."""
    rows = [each.row for each in found]
    means = (
        "exact_match",
        "teacher_forced",
        "token_accuracy",
        "bits",
        "calibration_error",
        "free_running",
    )
    mean = {
        name: None if rows[0][name] is None else float(np.mean([row[name] for row in rows]))
        for name in means
    }
    answers = sum(row["answers"] for row in rows)
    right = round(sum(row["exact_match"] * row["answers"] for row in rows))
    return {
        **rows[0],
        **mean,
        "interval": wilson(right, answers),
        "answers": answers,
        "learning_rate": rate,
        "by_seed": [row["exact_match"] for row in rows],
    }
