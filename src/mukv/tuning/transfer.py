"""Learning-rate transfer: find the best learning rate along an axis, and how it drifts.

The axis is the width, or the depth, the batch or the number of steps (`axes`). At each of its
values learning rates are swept in octaves, with several seeds, until the best is not at an edge.
The optimum is the vertex of a parabola through the losses near the best, over log2 of the learning
rate. The drift is the slope of log2 of the optimum against log2 of the value. The gap is the loss
that the largest value has more at the smallest one's optimum than at its own. Every measured loss
is saved, so that an interrupted search resumes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from mukv.core import statistics
from mukv.core.errors import BadInput
from mukv.data.feed import Feed
from mukv.model import LanguageModel
from mukv.schema import schema
from mukv.schema.numbers import leaves
from mukv.show.figures import legend, saved_figure, series_styles
from mukv.storage.files import write_atomic
from mukv.storage.json_text import to_json
from mukv.train.training import Training
from mukv.tuning.axes import Axis, along
from mukv.tuning.together import Point, Together, free_memory, grouped

DRIFT_LIMIT = 0.3
"""Largest absolute drift that passes, in octaves of learning rate per octave of the value (our
choice)."""
GAP_LIMIT = 0.03
"""Largest gap that passes, in nats per token."""
AROUND = 2
"""Octaves on each side of the best learning rate to which the parabola is fitted."""
MOST_EXTENSIONS = 6
SIGMAS = 2.0


@dataclass(frozen=True)
class Optimum:
    """Best learning rate of one value.

    rate: log2 of the best learning rate
    low, high: ends of its interval of two standard errors over seeds, log2
    loss: validation loss at the best learning rate, in nats per token
    inside: whether learning rates on both sides of the best were tried
    """

    rate: float
    low: float
    high: float
    loss: float
    inside: bool


@dataclass(frozen=True)
class Transfer:
    """Result of a search.

    optima: best learning rate by value
    drift, low, high: drift and the ends of its interval, in octaves of learning rate per octave of
        the value
    gap: loss of the largest value at the smallest one's optimum, less its loss at its own, in nats
        per token
    """

    optima: Mapping[int, Optimum]
    drift: float
    low: float
    high: float
    gap: float

    @property
    def passed(self) -> bool:
        """Whether drift and gap are within their limits and every optimum is inside the tried
        range."""
        small = abs(self.drift) <= DRIFT_LIMIT and self.gap <= GAP_LIMIT
        return small and all(each.inside for each in self.optima.values())


@dataclass
class Search:
    """A search of the best learning rate at several values along an axis.

    values: such as widths
    octaves: octaves that are tried first on each side of the centre
    memory: bytes of device memory that a program may take; None for `free_memory`
    axis: what the values are
    losses: validation loss after the last step by (value, log2 of the learning rate, seed);
        infinite where a run diverged
    """

    model: LanguageModel
    training: Training
    feed: Feed
    values: Sequence[int]
    seeds: int
    folder: Path
    octaves: int = 2
    memory: int | None = None
    axis: Axis = "width"
    losses: dict[tuple[int, float, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make the runs. Raises BadInput for values that can't be compared, and for a folder with
        the losses of another search."""
        for name, number in (("seeds", self.seeds), ("octaves", self.octaves)):
            if number < 1:
                raise BadInput(name, number, "at least 1")
        if self.training.adapter is not None:
            allowed = "null: a search trains whole models; the coordinate check takes adapters"
            raise BadInput("train.adapter", self.training.adapter, allowed)
        base, self.points = along(self.axis, self.values, self.model, self.training)
        plan = replace(base.training, seed=0, learning_rate=1.0)
        mapping = {
            name: schema.to_mapping(part) for name, part in (("model", base.model), ("train", plan))
        }
        self.facts = leaves({**mapping, "data": {"fingerprint": self.feed.fingerprint}})
        if self.axis != "width":
            self.facts["axis"] = self.axis
        if self.path.exists():
            self._read()

    @property
    def path(self) -> Path:
        return self.folder / "losses.json"

    def run(self) -> Transfer:
        """Measure the losses that are not measured yet, and return the result."""
        centre = round(math.log2(self.training.learning_rate) * 2) / 2
        for value in self.points:
            rates = [centre + step for step in range(-self.octaves, self.octaves + 1)]
            self._measure(value, rates)
            for _ in range(MOST_EXTENSIONS):
                beyond = list(self._beyond(value))
                if not beyond:
                    break
                self._measure(value, beyond)
            # The search at the next value is centred on this value's optimum.
            centre = round(self.optimum(value).rate)
        return self.verdict()

    def verdict(self) -> Transfer:
        """Compute the result from the measured losses."""
        optima = {value: self.optimum(value) for value in self.points}
        vertices = [
            (math.log2(value), log2_rate)
            for value in self.points
            for log2_rate in self._vertices(value)
        ]
        drift, error = statistics.line(vertices)
        largest, smallest = max(self.points), min(self.points)
        gap = self.loss_at(largest, optima[smallest].rate) - optima[largest].loss
        return Transfer(optima, drift, drift - SIGMAS * error, drift + SIGMAS * error, gap)

    def rates(self, value: int) -> list[float]:
        """Return log2 of the tried learning rates, ascending."""
        return sorted({log2_rate for other, log2_rate, _ in self.losses if other == value})

    def mean(self, value: int, log2_rate: float) -> float:
        """Return the mean loss over seeds. log2_rate: log2 of the learning rate."""
        return float(np.mean([self.losses[value, log2_rate, seed] for seed in range(self.seeds)]))

    def loss_at(self, value: int, log2_rate: float) -> float:
        """Interpolate the loss between tried learning rates, by the parabola in its range and
        linearly elsewhere; infinite beyond the tried learning rates.

        log2_rate: log2 of the learning rate
        """
        optimum = self.optimum(value)
        if abs(log2_rate - optimum.rate) < 1e-9:
            return optimum.loss
        near, losses = self._near(value, None)
        if len(near) >= 3 and near[0] <= log2_rate <= near[-1]:
            return float(np.polyval(np.polyfit(near, losses, 2), log2_rate))
        tried = self.rates(value)
        means = [self.mean(value, each) for each in tried]
        if not tried[0] <= log2_rate <= tried[-1]:
            return math.inf
        return float(np.interp(log2_rate, tried, means))

    def optimum(self, value: int) -> Optimum:
        """Compute the optimum of a value."""
        tried = self.rates(value)
        best = min(tried, key=lambda log2_rate: self.mean(value, log2_rate))
        vertices = self._vertices(value)
        error = float(np.std(vertices, ddof=1) / math.sqrt(len(vertices))) if self.seeds > 1 else 0
        best_rate, loss = statistics.vertex(*self._near(value, None))
        return Optimum(
            best_rate,
            best_rate - SIGMAS * error,
            best_rate + SIGMAS * error,
            loss,
            tried[0] < best < tried[-1],
        )

    def _vertices(self, value: int) -> list[float]:
        """Return log2 of the best learning rate of each seed."""
        return [statistics.vertex(*self._near(value, seed))[0] for seed in range(self.seeds)]

    def _near(self, value: int, seed: int | None) -> tuple[list[float], list[float]]:
        """Return log2 of the learning rates near the best, and their losses.

        seed: seed whose losses are returned; None for the mean over seeds

        The best learning rate is the one with the smallest mean loss. Learning rates with a mean
        loss more than a fifth above that are left out (the threshold of Everett et al.).
        """
        tried = self.rates(value)
        best = min(tried, key=lambda log2_rate: self.mean(value, log2_rate))
        limit = 1.2 * self.mean(value, best)
        near = [
            log2_rate
            for log2_rate in tried
            if abs(log2_rate - best) <= AROUND
            and (self.mean(value, log2_rate) <= limit or log2_rate == best)
        ]
        if seed is None:
            return near, [self.mean(value, log2_rate) for log2_rate in near]
        return near, [self.losses[value, log2_rate, seed] for log2_rate in near]

    def _beyond(self, value: int) -> Iterator[float]:
        """Yield log2 of further learning rates to try if the best is at an end of those tried."""
        tried = self.rates(value)
        best = min(tried, key=lambda log2_rate: self.mean(value, log2_rate))
        if best == tried[0]:
            yield from (best - 1, best - 2)
        if best == tried[-1]:
            yield best + 1

    def _measure(self, value: int, rates: Sequence[float]) -> None:
        wanted = [
            (value, log2_rate, seed)
            for log2_rate in rates
            for seed in range(self.seeds)
            if (value, log2_rate, seed) not in self.losses
        ]
        model, plan = self.points[value]
        points = [
            Point(model, replace(plan, learning_rate=2.0**log2_rate, seed=seed))
            for _, log2_rate, seed in wanted
        ]
        budget = free_memory() if self.memory is None else self.memory
        for indices in grouped(points):
            names = iter(wanted[index] for index in indices)
            whole = Together([points[index] for index in indices], self.feed)
            for part in whole.fitting(budget):
                last = [math.inf] * len(part.points)
                for report in part.run(f"{self.axis} {value}, {len(rates)} rates"):
                    last = [row.get("validation_loss", math.inf) for row in report.numbers]
                for loss in last:
                    self.losses[next(names)] = loss
                self._write()

    def _write(self) -> None:
        rows = [[*key, loss if math.isfinite(loss) else None] for key, loss in self.losses.items()]
        write_atomic(self.path, to_json({"facts": self.facts, "losses": rows}) + "\n")

    def _read(self) -> None:
        saved = json.loads(self.path.read_text())
        before, now = saved["facts"], json.loads(json.dumps(self.facts))
        for name in {**now, **before}:
            if before.get(name) != now.get(name):
                raise BadInput(
                    name,
                    now.get(name, "nothing"),
                    f"the search in {self.folder} has {before.get(name, 'nothing')}; give another "
                    "folder with --out",
                )
        for value, log2_rate, seed, loss in saved["losses"]:
            self.losses[value, log2_rate, seed] = math.inf if loss is None else loss


def facts(search: Search, result: Transfer) -> dict[str, Any]:
    """Return the fields that `--json` prints; `optima` has log2 of learning rates."""
    return {
        "drift": result.drift,
        "low": result.low,
        "high": result.high,
        "gap": result.gap,
        "passed": result.passed,
        "axis": search.axis,
        "optima": {str(value): vars(optimum) for value, optimum in result.optima.items()},
        "losses": [
            {search.axis: value, "log2_rate": log2_rate, "seed": seed, "loss": loss}
            for (value, log2_rate, seed), loss in sorted(search.losses.items())
            if math.isfinite(loss)
        ],
    }


def draw(search: Search, result: Transfer, path: Path, title: str) -> None:
    """Draw the loss against the learning rate by value, and the optimum against the value."""
    axis, seeded = search.axis, search.seeds > 1
    bars = (
        f"Bars: range of {search.seeds} seeds, and two standard errors of the best rate." * seeded
    )
    about = f"Loss against learning rate at each {axis}; stars: the best rate of each. {bars}"
    with saved_figure(path, (9.6, 4.0), title, about.strip()) as figure:
        left, right = figure.subplots(1, 2)
        for value, style in zip(search.points, series_styles(len(search.points)), strict=True):
            tried = [
                log2_rate
                for log2_rate in search.rates(value)
                if search.mean(value, log2_rate) < math.inf
            ]
            means = np.array([search.mean(value, log2_rate) for log2_rate in tried])
            each = np.array(
                [
                    [search.losses[value, log2_rate, seed] for seed in range(search.seeds)]
                    for log2_rate in tried
                ]
            ).reshape(len(tried), search.seeds)
            spread = (means - each.min(axis=1), each.max(axis=1) - means) if seeded else None
            optimum = result.optima[value]
            left.errorbar(tried, means, spread, capsize=2, ms=4, label=f"{value}", **style)
            left.plot(optimum.rate, optimum.loss, "*", ms=12, color=style["color"])
        finite = [optimum.loss for optimum in result.optima.values()]
        low, high = min(finite) - 0.1, max(finite) + 1.2
        near = [log2_rate for (_, log2_rate, _), loss in search.losses.items() if loss <= high]
        left.set(ylim=(low, high), xlim=(min(near) - 0.5, max(near) + 0.5))
        left.set(xlabel="log2 of the learning rate", ylabel="validation loss, nats per token")
        values = np.log2(list(result.optima))
        rates = np.array([optimum.rate for optimum in result.optima.values()])
        errors = [optimum.high - optimum.rate for optimum in result.optima.values()]
        right.errorbar(
            values, rates, errors if seeded else None, marker="o", capsize=3, linestyle="none"
        )
        middle = rates.mean() + result.drift * (values - values.mean())
        right.plot(values, middle, color="0.4")
        right.set_xticks(values, [str(value) for value in result.optima])
        right.set_ylim(rates.min() - 1.5, rates.max() + 1.5)
        right.set(xlabel=axis, ylabel="log2 of the best learning rate")
        right.set_title(f"drift {result.drift:+.2f} octaves per octave", fontsize=10)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        legend(figure, left, axis)
