"""Learning-rate transfer: find the best learning rate at each width, and how it drifts with width.

At each width learning rates are swept in octaves, with several seeds, until the best is not at an
edge. The optimum is the vertex of a parabola through the losses near the best, over log2 of the
learning rate. The drift is the slope of log2 of the optimum against log2 of the width. The gap is
the loss that the widest model has more at the narrowest model's optimum than at its own. Every
measured loss is saved, so that an interrupted search resumes.
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
from mukv.model.width import widened
from mukv.schema import schema
from mukv.schema.numbers import leaves
from mukv.show.figures import legend, saved_figure, series_styles
from mukv.storage.files import write_atomic
from mukv.storage.json_text import to_json
from mukv.train.training import Training
from mukv.tuning.together import Point, Together, free_memory, grouped

DRIFT_LIMIT = 0.3
"""Largest absolute drift that passes, in octaves of learning rate per octave of width (our choice).
"""
GAP_LIMIT = 0.03
"""Largest gap that passes, in nats per token."""
AROUND = 2
"""Octaves on each side of the best learning rate to which the parabola is fitted."""
MOST_EXTENSIONS = 6
SIGMAS = 2.0


@dataclass(frozen=True)
class Optimum:
    """Best learning rate of one width.

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

    optima: best learning rate by width
    drift, low, high: drift and the ends of its interval, in octaves of learning rate per octave of
        width
    gap: loss of the widest model at the narrowest model's optimum, less its loss at its own, in
        nats per token
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
    """A search of the best learning rate at several widths.

    octaves: octaves that are tried first on each side of the centre
    memory: bytes of device memory that a program may take; None for `free_memory`
    losses: validation loss after the last step by (width, log2 of the learning rate, seed);
        infinite where a run diverged
    """

    model: LanguageModel
    training: Training
    feed: Feed
    widths: Sequence[int]
    seeds: int
    folder: Path
    octaves: int = 2
    memory: int | None = None
    losses: dict[tuple[int, float, int], float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Widen the model. Raises BadInput for widths that can't be compared, and for a folder with
        the losses of another search."""
        if len(set(self.widths)) < 2:
            raise BadInput("widths", list(self.widths), "at least two different ones")
        for name, number in (("seeds", self.seeds), ("octaves", self.octaves)):
            if number < 1:
                raise BadInput(name, number, "at least 1")
        if min(self.widths) < 1:
            raise BadInput("widths", min(self.widths), "at least 1")
        if self.training.adapter is not None:
            allowed = "null: a search trains whole models; the coordinate check takes adapters"
            raise BadInput("train.adapter", self.training.adapter, allowed)
        narrow = replace(widened(self.model, min(self.widths)), scaling=self.model.scaling)
        self.models = {width: widened(narrow, width) for width in sorted(set(self.widths))}
        sections = {"model": narrow, "train": replace(self.training, seed=0, learning_rate=1.0)}
        mapping = {name: schema.to_mapping(part) for name, part in sections.items()}
        self.facts = leaves({**mapping, "data": {"fingerprint": self.feed.fingerprint}})
        if self.path.exists():
            self._read()

    @property
    def path(self) -> Path:
        return self.folder / "losses.json"

    def run(self) -> Transfer:
        """Measure the losses that are not measured yet, and return the result."""
        centre = round(math.log2(self.training.learning_rate) * 2) / 2
        for width in self.models:
            rates = [centre + step for step in range(-self.octaves, self.octaves + 1)]
            self._measure(width, rates)
            for _ in range(MOST_EXTENSIONS):
                beyond = list(self._beyond(width))
                if not beyond:
                    break
                self._measure(width, beyond)
            # The search at the next width is centred on this width's optimum.
            centre = round(self.optimum(width).rate)
        return self.verdict()

    def verdict(self) -> Transfer:
        """Compute the result from the measured losses."""
        optima = {width: self.optimum(width) for width in self.models}
        points = [
            (math.log2(width), log2_rate)
            for width in self.models
            for log2_rate in self._vertices(width)
        ]
        drift, error = statistics.line(points)
        widest, narrowest = max(self.models), min(self.models)
        gap = self.loss_at(widest, optima[narrowest].rate) - optima[widest].loss
        return Transfer(optima, drift, drift - SIGMAS * error, drift + SIGMAS * error, gap)

    def rates(self, width: int) -> list[float]:
        """Return log2 of the tried learning rates, ascending."""
        return sorted({log2_rate for other, log2_rate, _ in self.losses if other == width})

    def mean(self, width: int, log2_rate: float) -> float:
        """Return the mean loss over seeds. log2_rate: log2 of the learning rate."""
        return float(np.mean([self.losses[width, log2_rate, seed] for seed in range(self.seeds)]))

    def loss_at(self, width: int, log2_rate: float) -> float:
        """Interpolate the loss between tried learning rates, by the parabola in its range and
        linearly elsewhere; infinite beyond the tried learning rates.

        log2_rate: log2 of the learning rate
        """
        optimum = self.optimum(width)
        if abs(log2_rate - optimum.rate) < 1e-9:
            return optimum.loss
        near, losses = self._near(width, None)
        if len(near) >= 3 and near[0] <= log2_rate <= near[-1]:
            return float(np.polyval(np.polyfit(near, losses, 2), log2_rate))
        tried = self.rates(width)
        means = [self.mean(width, each) for each in tried]
        if not tried[0] <= log2_rate <= tried[-1]:
            return math.inf
        return float(np.interp(log2_rate, tried, means))

    def optimum(self, width: int) -> Optimum:
        """Compute the optimum of a width."""
        tried = self.rates(width)
        best = min(tried, key=lambda log2_rate: self.mean(width, log2_rate))
        vertices = self._vertices(width)
        error = float(np.std(vertices, ddof=1) / math.sqrt(len(vertices))) if self.seeds > 1 else 0
        best_rate, loss = statistics.vertex(*self._near(width, None))
        return Optimum(
            best_rate,
            best_rate - SIGMAS * error,
            best_rate + SIGMAS * error,
            loss,
            tried[0] < best < tried[-1],
        )

    def _vertices(self, width: int) -> list[float]:
        """Return log2 of the best learning rate of each seed."""
        return [statistics.vertex(*self._near(width, seed))[0] for seed in range(self.seeds)]

    def _near(self, width: int, seed: int | None) -> tuple[list[float], list[float]]:
        """Return log2 of the learning rates near the best, and their losses.

        seed: seed whose losses are returned; None for the mean over seeds

        The best learning rate is the one with the smallest mean loss. Learning rates with a mean
        loss more than a fifth above that are left out (the threshold of Everett et al.).
        """
        tried = self.rates(width)
        best = min(tried, key=lambda log2_rate: self.mean(width, log2_rate))
        limit = 1.2 * self.mean(width, best)
        near = [
            log2_rate
            for log2_rate in tried
            if abs(log2_rate - best) <= AROUND
            and (self.mean(width, log2_rate) <= limit or log2_rate == best)
        ]
        if seed is None:
            return near, [self.mean(width, log2_rate) for log2_rate in near]
        return near, [self.losses[width, log2_rate, seed] for log2_rate in near]

    def _beyond(self, width: int) -> Iterator[float]:
        """Yield log2 of further learning rates to try if the best is at an end of those tried."""
        tried = self.rates(width)
        best = min(tried, key=lambda log2_rate: self.mean(width, log2_rate))
        if best == tried[0]:
            yield from (best - 1, best - 2)
        if best == tried[-1]:
            yield best + 1

    def _measure(self, width: int, rates: Sequence[float]) -> None:
        wanted = [
            (width, log2_rate, seed)
            for log2_rate in rates
            for seed in range(self.seeds)
            if (width, log2_rate, seed) not in self.losses
        ]
        points = [
            Point(
                self.models[width], replace(self.training, learning_rate=2.0**log2_rate, seed=seed)
            )
            for _, log2_rate, seed in wanted
        ]
        budget = free_memory() if self.memory is None else self.memory
        for indices in grouped(points):
            names = iter(wanted[index] for index in indices)
            whole = Together([points[index] for index in indices], self.feed)
            for part in whole.fitting(budget):
                last = [math.inf] * len(part.points)
                for report in part.run(f"width {width}, {len(rates)} rates"):
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
        for width, log2_rate, seed, loss in saved["losses"]:
            self.losses[width, log2_rate, seed] = math.inf if loss is None else loss


def facts(search: Search, result: Transfer) -> dict[str, Any]:
    """Return the fields that `--json` prints; `optima` has log2 of learning rates."""
    return {
        "drift": result.drift,
        "low": result.low,
        "high": result.high,
        "gap": result.gap,
        "passed": result.passed,
        "optima": {str(width): vars(optimum) for width, optimum in result.optima.items()},
        "losses": [
            {"width": width, "log2_rate": log2_rate, "seed": seed, "loss": loss}
            for (width, log2_rate, seed), loss in sorted(search.losses.items())
            if math.isfinite(loss)
        ],
    }


def draw(search: Search, result: Transfer, path: Path, title: str) -> None:
    """Draw the loss against the learning rate by width, and the optimum against the width."""
    seeded = search.seeds > 1
    bars = (
        f"Bars: range of {search.seeds} seeds, and two standard errors of the best rate." * seeded
    )
    about = f"Loss against learning rate at each width; stars: the best rate of each. {bars}"
    with saved_figure(path, (9.6, 4.0), title, about.strip()) as figure:
        left, right = figure.subplots(1, 2)
        for width, style in zip(search.models, series_styles(len(search.models)), strict=True):
            tried = [
                log2_rate
                for log2_rate in search.rates(width)
                if search.mean(width, log2_rate) < math.inf
            ]
            means = np.array([search.mean(width, log2_rate) for log2_rate in tried])
            each = np.array(
                [
                    [search.losses[width, log2_rate, seed] for seed in range(search.seeds)]
                    for log2_rate in tried
                ]
            ).reshape(len(tried), search.seeds)
            spread = (means - each.min(axis=1), each.max(axis=1) - means) if seeded else None
            optimum = result.optima[width]
            left.errorbar(tried, means, spread, capsize=2, ms=4, label=f"{width}", **style)
            left.plot(optimum.rate, optimum.loss, "*", ms=12, color=style["color"])
        finite = [optimum.loss for optimum in result.optima.values()]
        low, high = min(finite) - 0.1, max(finite) + 1.2
        near = [log2_rate for (_, log2_rate, _), loss in search.losses.items() if loss <= high]
        left.set(ylim=(low, high), xlim=(min(near) - 0.5, max(near) + 0.5))
        left.set(xlabel="log2 of the learning rate", ylabel="validation loss, nats per token")
        widths = np.log2(list(result.optima))
        rates = np.array([optimum.rate for optimum in result.optima.values()])
        errors = [optimum.high - optimum.rate for optimum in result.optima.values()]
        right.errorbar(
            widths, rates, errors if seeded else None, marker="o", capsize=3, linestyle="none"
        )
        middle = rates.mean() + result.drift * (widths - widths.mean())
        right.plot(widths, middle, color="0.4")
        right.set_xticks(widths, [str(width) for width in result.optima])
        right.set_ylim(rates.min() - 1.5, rates.max() + 1.5)
        right.set(xlabel="width", ylabel="log2 of the best learning rate")
        right.set_title(f"drift {result.drift:+.2f} octaves per octave", fontsize=10)
        for axes in (left, right):
            axes.grid(alpha=0.3)
        legend(figure, left, "width")
