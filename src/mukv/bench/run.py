"""Run the benchmark on a model, or on a configuration that is trained for it, and write the
results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mukv.bench.asking import Asker
from mukv.bench.examine import Examination, ExamineSettings, check, examine, in_words
from mukv.bench.grading import effective_length
from mukv.bench.picture import draw
from mukv.bench.prompting import asker_of, examine_prompts, shown
from mukv.bench.trial import Trial
from mukv.core.errors import BadInput
from mukv.core.names import shortened
from mukv.runs.loaded import Model
from mukv.schema import schema
from mukv.show.output import Tell
from mukv.show.progress import Bar
from mukv.storage.files import write_atomic
from mukv.storage.json_text import to_json
from mukv.tasks import AnyTask
from mukv.tasks.prompts import Prompt, PromptForm

ANSWERS_SHOWN, ANSWER_LETTERS = 2, 160
"""Number of answers of each task that are shown if none is right, and their maximum length."""


def try_configuration(
    trial: Trial, tasks: Mapping[str, AnyTask], out: Path, tell: Tell
) -> list[dict[str, Any]]:
    """Train and test a configuration on each task; return the rows of the table. Raises BadInput
    before any training."""
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
    """Test a trained model on each task; return the rows of the table. Raises BadInput before the
    first test.

    tell: called with lines to print: a sample of each task that is asked with prompts, and some of
        the model's answers if none is right
    """
    tests = {
        name: with_name(name, lambda task=task: _test(model, task, settings))
        for name, task in tasks.items()
    }
    for name, test in tests.items():
        for length in lengths:
            with_name(name, partial(test.check, length))
    rows: list[dict[str, Any]] = []
    answers: list[dict[str, Any]] = []
    for name, test in tests.items():
        tell(f"{name}: {settings.samples} samples at {', '.join(map(str, lengths))}")
        for line in test.example(lengths[0]):
            tell(f"  {line}")
        results = _results(name, test, lengths)
        scores = {each.row["length"]: each.row["exact_match"] for each in results}
        mastered = effective_length(scores, results[0].row["chance"])
        own = [{**each.row, "effective_length": mastered} for each in results]
        rows += own
        answers += [{"task": name, **answer} for answer in results[0].answers[:ANSWERS_SHOWN]]
        every = {
            "every": [answer for each in results for answer in each.answers],
            "decoded": [answer for each in results for answer in each.decoded],
        }
        write(out, name, test.task, own, every)
        draw(rows, out / "benchmark.png")
    if not any(row["exact_match"] for row in rows):
        for line in instead(answers):
            tell(line)
    return rows


@dataclass(frozen=True)
class _OwnForm:
    """Test of a model with a task's ids or its own text."""

    model: Model
    task: AnyTask
    settings: ExamineSettings

    def check(self, length: int) -> None:
        """Raise BadInput if the model can't be tested at this length."""
        check(self.model, self.task, length)

    def example(self, length: int) -> list[str]:
        """Return the lines of a sample that is shown before the test."""
        return []

    def run(self, name: str, length: int, tick: Callable[[int], None]) -> Examination:
        """Test the model. tick: called with the number of samples that are done."""
        found = examine(self.model, name, self.task, length, self.settings)
        tick(self.settings.samples)
        return found


@dataclass(frozen=True)
class _InWords(_OwnForm):
    """Test of a model with prompts."""

    form: PromptForm
    asker: Asker

    def check(self, length: int) -> None:
        super().check(length)
        self._first(length)

    def example(self, length: int) -> list[str]:
        prompt = self._first(length)
        return shown(self.asker.whole(prompt), prompt.answers).splitlines()

    def run(self, name: str, length: int, tick: Callable[[int], None]) -> Examination:
        return examine_prompts(self.asker, name, self.form, length, self.settings, tick)

    def _first(self, length: int) -> Prompt:
        (prompt,) = self.asker.fitting(self.form, length, self.settings.seed, np.arange(1))
        return prompt


def _test(model: Model, task: AnyTask, settings: ExamineSettings) -> _OwnForm:
    if not in_words(model, task, settings):
        return _OwnForm(model, task, settings)
    form = PromptForm(task, settings.haystack)
    return _InWords(model, task, settings, form, asker_of(model, form, settings))


def _results(name: str, test: _OwnForm, lengths: Sequence[int]) -> list[Examination]:
    """Test a model at each length, with a progress bar."""
    results: list[Examination] = []
    each = test.settings.samples
    with Bar(name, each * len(lengths)) as bar:
        for length in lengths:
            before = each * len(results)

            def tick(done: int, before: int = before, length: int = length) -> None:
                bar.show(before + done, {"length": f"{length:,}"})

            results.append(with_name(name, partial(test.run, name, length, tick)))
    return results


def instead(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return lines that compare wrong answers of a model with the expected ones."""
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
    """Return the result of `work`; add the task's name to a BadInput that it raises."""
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
