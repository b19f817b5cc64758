"""Run the benchmark on a model, or on a configuration that is trained for it, and write
its files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mukv.bench.examine import ExamineSettings, check, examine
from mukv.bench.grading import effective_length
from mukv.bench.picture import draw
from mukv.bench.trial import Trial
from mukv.core.errors import BadInput
from mukv.runs.loaded import Model
from mukv.schema import schema
from mukv.storage.files import write_atomic
from mukv.storage.json_text import to_json
from mukv.tasks import AnyTask

Tell = Callable[[str], None]


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
    """Test a trained model on each task. Raises BadInput before the first test."""
    for name, task in tasks.items():
        for length in lengths:
            with_name(name, lambda task=task, length=length: check(model, task, length))
    rows: list[dict[str, Any]] = []
    for name, task in tasks.items():
        tell(f"{name}: {settings.samples} samples at {', '.join(map(str, lengths))}")
        results = [
            with_name(
                name,
                lambda task=task, length=length, name=name: examine(
                    model, name, task, length, settings
                ),
            )
            for length in lengths
        ]
        scores = {each.row["length"]: each.row["exact_match"] for each in results}
        mastered = effective_length(scores, results[0].row["chance"])
        own = [{**each.row, "effective_length": mastered} for each in results]
        rows += own
        every = {"every": [answer for each in results for answer in each.answers]}
        write(out, name, task, own, every)
        draw(rows, out / "benchmark.png")
    return rows


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
