"""Run the benchmark on a model, or on a configuration that is trained for it, and write
its files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mukv.bench.examine import Examination, ExamineSettings, check, examine, in_words
from mukv.bench.grading import effective_length
from mukv.bench.picture import draw
from mukv.bench.prompting import asker_of, examine_prompts, shown
from mukv.bench.trial import Trial
from mukv.core.errors import BadInput
from mukv.core.names import shortened
from mukv.runs.loaded import Model
from mukv.schema import schema
from mukv.show.progress import Bar
from mukv.storage.files import write_atomic
from mukv.storage.json_text import to_json
from mukv.tasks import AnyTask
from mukv.tasks.prompts import Prompt, PromptForm

Tell = Callable[[str], None]
ANSWERS_SHOWN, ANSWER_LETTERS = 2, 160
"""Answers of each task that are shown if none is right, and characters of each."""


def try_configuration(
    trial: Trial, tasks: Mapping[str, AnyTask], out: Path, tell: Tell
) -> list[dict[str, Any]]:
    """Train and test a configuration on each task. Raises BadInput before the first is trained."""
    for name, task in tasks.items():
        with_name(name, lambda task=task: trial.check(task))
    rows: list[dict[str, Any]] = []
    for name, task in tasks.items():
        tell(f"{name}: {len(trial.rates)} learning rates x {trial.seeds} seeds")
        own, seen = trial.examine(name, task)
        rows += own
        write(out, name, task, own, seen)
        draw(rows, out / "benchmark.png")
    return rows


def test_model(
    model: Model,
    tasks: Mapping[str, AnyTask],
    lengths: Sequence[int],
    settings: ExamineSettings,
    out: Path,
    tell: Tell,
) -> list[dict[str, Any]]:
    """Test a trained model on each task. Raises BadInput before the first test.

    tell: receives a sample of each task that is asked with prompts, and, if no answer at all is
        right, some of the model's answers
    """
    tests = {
        name: with_name(name, lambda task=task: _Test(model, task, settings))
        for name, task in tasks.items()
    }
    for name, test in tests.items():
        for length in lengths:
            with_name(name, partial(test.check, length))
    rows: list[dict[str, Any]] = []
    some: list[dict[str, Any]] = []
    for name, test in tests.items():
        tell(f"{name}: {settings.samples} samples at {', '.join(map(str, lengths))}")
        if test.asker is not None:
            for line in shown(test.example(lengths[0])).splitlines():
                tell(f"  {line}")
        with Bar(name, settings.samples * len(lengths), silent=test.asker is None) as bar:
            results: list[Examination] = []
            for length in lengths:
                begun = settings.samples * len(results)

                def tick(done: int, begun: int = begun, length: int = length) -> None:
                    bar.show(begun + done, {"length": f"{length:,}"})

                results.append(with_name(name, partial(test.run, name, length, tick)))
        scores = {each.row["length"]: each.row["exact_match"] for each in results}
        mastered = effective_length(scores, results[0].row["chance"])
        own = [{**each.row, "effective_length": mastered} for each in results]
        rows += own
        some += [{"task": name, **answer} for answer in results[0].answers[:ANSWERS_SHOWN]]
        every = {
            "every": [answer for each in results for answer in each.answers],
            "decoded": [answer for each in results for answer in each.decoded],
        }
        write(out, name, test.task, own, every)
        draw(rows, out / "benchmark.png")
    if not any(row["exact_match"] for row in rows):
        for line in instead(some):
            tell(line)
    return rows


class _Test:
    """A model and a task that it is tested on.

    asker: the model as it is asked with prompts; None where it reads the task's text or ids
    """

    def __init__(self, model: Model, task: AnyTask, settings: ExamineSettings):
        self.model, self.task, self.settings = model, task, settings
        words = in_words(model, task, settings)
        self.form = PromptForm(task, settings.haystack) if words else None
        self.asker = asker_of(model, self.form, settings) if self.form else None

    def check(self, length: int) -> None:
        """Raise BadInput if the model can't be tested at this length."""
        check(self.model, self.task, length)
        if self.asker is not None:
            self._prompts(length)

    def _prompts(self, length: int) -> list[Prompt]:
        """Return sample 0."""
        assert self.asker
        assert self.form
        return self.asker.fitting(self.form, length, self.settings.seed, np.arange(1))

    def example(self, length: int) -> dict[str, Any]:
        """Return what is asked in sample 0, and the right answer."""
        assert self.asker
        (prompt,) = self._prompts(length)
        return {"prompt": self.asker.whole(prompt), "expected": prompt.answers}

    def run(self, name: str, length: int, tick: Callable[[int], None]) -> Examination:
        if self.asker is None or self.form is None:
            return examine(self.model, name, self.task, length, self.settings)
        return examine_prompts(self.asker, name, self.form, length, self.settings, tick)


def instead(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines on wrong answers: what was expected and what the model wrote."""
    lines = ["no answer is right; the model wrote instead:"]
    for each in answers:
        expected = each["expected"]
        wanted = expected if isinstance(expected, str) else ", ".join(expected)
        given = shortened(each["answer"], ANSWER_LETTERS)
        lines.append(
            f"  {each['task']}, {each['length']:,} tokens: expected {wanted.strip()!r}, "
            f"answered {given!r}"
        )
    return lines


def with_name(name: str, work: Callable[[], Any]) -> Any:
    """Return the result of `work`; put the task's name into a BadInput that it raises."""
    try:
        return work()
    except BadInput as error:
        raise BadInput(f"{name}: {error.where}", error.given, error.allowed) from None


def write(
    out: Path,
    name: str,
    task: AnyTask,
    rows: Sequence[Mapping[str, Any]],
    seen: Mapping[str, Any],
) -> None:
    """Write one task's file: its parameters, its rows, and every answer."""
    whole = {"task": name, "knobs": schema.to_mapping(task), "rows": rows, **seen}
    write_atomic(out / f"{name}.json", to_json(whole) + "\n")


def with_facts(tasks: Mapping[str, AnyTask], facts: int | None) -> dict[str, AnyTask]:
    """Return the tasks with another number of facts. Raises BadInput if a task can't have it."""
    if facts is None:
        return dict(tasks)
    return {
        name: with_name(name, lambda task=task: replace(task, facts=facts))
        for name, task in tasks.items()
    }
