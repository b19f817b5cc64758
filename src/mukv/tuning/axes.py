"""The axes along which hyperparameters may transfer: width, depth, batch and horizon.

An axis makes a model and a training plan for each of its values from those of a configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple

from mukv.core.errors import BadInput
from mukv.model import LanguageModel
from mukv.model.depth import deepened
from mukv.model.width import widened
from mukv.train.training import Training
from mukv.tuning.together import Point

Axis = Literal["width", "depth", "batch", "horizon"]


class Along(NamedTuple):
    """The runs along an axis.

    base: run of the smallest value, with the scaling of the configuration
    points: run of each value, ascending
    """

    base: Point
    points: dict[int, Point]


class AxisRule(NamedTuple):
    """How the runs along an axis are made.

    plural: name of the values in options and errors
    meaning: what the values are
    make: the runs from model, training and ascending values; raises BadInput
    """

    plural: str
    meaning: str
    make: Callable[[LanguageModel, Training, Sequence[int]], Along]


def along(axis: Axis, values: Sequence[int], model: LanguageModel, training: Training) -> Along:
    """Return the runs along an axis. Raises BadInput for fewer than two values, and for one that
    does not fit the model or the training plan."""
    rule = AXES[axis]
    if len(set(values)) < 2:
        raise BadInput(rule.plural, list(values), "at least two different ones")
    if min(values) < 1:
        raise BadInput(rule.plural, min(values), "at least 1")
    return rule.make(model, training, sorted(set(values)))


def _widths(model: LanguageModel, training: Training, values: Sequence[int]) -> Along:
    """Return the runs; the base of the scaling is the model's, or else the narrowest width."""
    narrow = replace(widened(model, values[0]), scaling=model.scaling)
    return Along(
        Point(narrow, training),
        {width: Point(widened(narrow, width), training) for width in values},
    )


def _depths(model: LanguageModel, training: Training, values: Sequence[int]) -> Along:
    """Return the runs; the base's number of layers is the model's, or else the smallest."""
    shallow = replace(deepened(model, values[0]), scaling=model.scaling)
    points = {depth: Point(deepened(shallow, depth), training) for depth in values}
    return Along(Point(shallow, training), points)


def _batches(model: LanguageModel, training: Training, values: Sequence[int]) -> Along:
    """Return the runs, which read the same number of rows, in training and in validation."""
    rows, limit = training.batch * training.steps, training.validation_batches
    points = {}
    for batch in values:
        if rows % batch:
            allowed = f"a divisor of the rows of training, batch * steps ({rows:,})"
            raise BadInput("batches", batch, allowed)
        read = None if limit is None else max(1, round(limit * training.batch / batch))
        plan = replace(training, batch=batch, validation_batches=read)
        points[batch] = Point(model, _lasting(plan, rows // batch))
    return Along(Point(model, training), points)


def _horizons(model: LanguageModel, training: Training, values: Sequence[int]) -> Along:
    return Along(
        Point(model, training),
        {steps: Point(model, _lasting(training, steps)) for steps in values},
    )


def _lasting(training: Training, steps: int) -> Training:
    """Return the plan with another number of steps; the warm-up is the same share of them."""
    schedule = training.schedule
    warmup = round(schedule.warmup * steps / training.steps)
    return replace(training, steps=steps, schedule=replace(schedule, warmup=warmup))


AXES: Mapping[Axis, AxisRule] = {
    "width": AxisRule("widths", "model.d_model", _widths),
    "depth": AxisRule("depths", "number of layers", _depths),
    "batch": AxisRule("batches", "train.batch, for equally many rows in all", _batches),
    "horizon": AxisRule("horizons", "train.steps", _horizons),
}
