"""Train a configuration on a task at one length, and test it at that and longer lengths.

Each learning rate is trained for the same number of steps. The best one has the most correct
answers on validation samples at the training length, over all seeds. Each run has a run directory,
so that an interrupted trial resumes.
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
    """A configuration to be trained and tested.

    run: model and training; its data, vocabulary size, length, learning rate and seed are replaced
    lengths: lengths of the test in tokens; the first one is also the length of training
    rates: learning rates to try
    seeds: number of seeds
    folder: folder in which runs are written
    settings: how models are tested
    growing: whether the number of facts grows with the length
    """

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
        """Raise BadInput for a task that can't be trained or tested on, before any work."""
        for length in self.lengths:
            self.at(task, length).check_length(length)
            context = self.run.model.context
            if context is not None and length > context:
                raise BadInput("--lengths", length, f"at most model.context ({context})")
        _ = self.runs(task)

    def at(self, task: AnyTask, length: int) -> AnyTask:
        """Return the task with the number of facts that it has at a length."""
        times = length // self.lengths[0]
        if not self.growing or times == 1:
            return task
        grown = replace(task, facts=task.facts * times)
        if grown.vocab_size != task.vocab_size:
            raise BadInput(
                "--growing",
                task.kind,
                "a task whose vocabulary does not depend on the number of facts",
            )
        return grown

    def runs(self, task: AnyTask) -> dict[tuple[float, int], Run]:
        """Return the runs by learning rate and seed."""
        vocab = -(-task.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
        model = replace(self.run.model, vocab_size=vocab)
        runs = {}
        for rate in self.rates:
            for number in range(self.seeds):
                training = replace(
                    self.run.train,
                    length=self.lengths[0],
                    learning_rate=rate,
                    seed=self.run.train.seed + number,
                )
                runs[rate, number] = replace(
                    self.run, model=model, data=Data(task=task), train=training
                )
        return runs

    def examine(self, name: str, task: AnyTask) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Return the rows by length, and the details of all runs."""
        models, validated = {}, {}
        only = replace(self.settings, free=0, policy=FULL)
        for (rate, number), run in self.runs(task).items():
            folder = RunDirectory(self.folder / "runs" / name / f"rate-{rate:g}-seed-{number}")
            outcome = train_run(run, folder, title=f"{name}, rate {rate:g}, seed {number}")
            outcome.require_finished(folder.path)
            model = loaded.load(folder.path)
            models[rate, number] = model
            result = examine(model, name, task, self.lengths[0], only, "validation")
            validated[rate, number] = result.row

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
        rows = [summary(results, best) for results in tested.values()]
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
                {"seed": number, **each.row, "every": each.answers, "decoded": each.decoded}
                for results in tested.values()
                for number, each in enumerate(results)
            ],
        }
        return rows, seen


def summary(results: Sequence[Examination], rate: float) -> dict[str, Any]:
    """Return means over seeds, with one confidence interval over the answers of all seeds."""
    rows = [each.row for each in results]
    means = (
        "exact_match",
        "partial",
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
